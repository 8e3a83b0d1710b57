"""The paper's tables in kind: random weights under its sigma, and a trained pair on its prompts."""

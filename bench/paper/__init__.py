"""The paper's tables in kind: random weights under its sigma, a trained pair on its data sets."""

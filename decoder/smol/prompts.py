"""Questions for the real model, as a user would type them; its chat template goes around them."""

CODE_PROMPTS: tuple[str, ...] = (
    "Write a Python function that checks whether a number is prime.",
    "Write a Python class for a stack with push, pop and peek.",
    "Write a Python function that merges two sorted lists into one sorted list.",
    "How do I read a CSV file in Python and print every row?",
    "Write a Python decorator that prints how long a function took.",
    "Complete this function:\n\n"
    "def binary_search(values, target):\n    low, high = 0, len(values) - 1\n",
    "Write a Python function that reverses a string.",
    "Write a Python function that finds the largest number in a list.",
)

CHAT_PROMPTS: tuple[str, ...] = (
    "Why is the sky blue?",
    "What is the difference between a virus and a bacterium?",
    "Give me three tips for learning a new language.",
    "Why is sleep important?",
)

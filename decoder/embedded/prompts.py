"""Built-in prompts: starts of ordinary Python functions, openings of reference prose."""

CODE_PROMPTS: tuple[str, ...] = (
    '''import os


def find_files(directory, suffix=".py"):
    """Return the sorted paths of all files below directory whose name ends with suffix."""
    result = []
    for root, dirs, files in os.walk(directory):
''',
    '''class LRUCache:
    """A mapping that keeps only the most recently used items."""

    def __init__(self, maxsize=128):
        self.maxsize = maxsize
        self.data = OrderedDict()

    def __getitem__(self, key):
''',
    '''def parse_header(line):
    """Split a header line into a name and a value.

    Raise ValueError if the line has no colon.
    """
    if not isinstance(line, str):
        raise TypeError(
''',
    '''import socket
import threading


class EchoServer:
    """Accept connections and send every line back to the client."""

    def __init__(self, host, port):
        self.host = host
        self.port = port
        self._lock = threading.Lock()

    def close(self):
''',
    '''def read_config(filename, encoding="utf-8"):
    """Read key = value pairs from a file and return them as a dictionary.

    Empty lines and lines starting with '#' are ignored.
    """
    config = {}
    with open(filename, encoding=encoding) as fp:
        for line in fp:
''',
    """class TestQueue(unittest.TestCase):

    def setUp(self):
        self.queue = Queue(maxsize=4)

    def test_put_and_get(self):
""",
    '''def format_size(size, precision=1):
    """Return a size in bytes as a human-readable string."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if size < 1024:
''',
    '''import argparse
import sys


def main(argv=None):
    """Count the lines of the files named on the command line."""
    parser = argparse.ArgumentParser(description="Count lines.")
    parser.add_argument(
''',
    '''class Node:
    """A node of a singly linked list."""

    def __init__(self, value, next=None):
        self.value = value
        self.next = next

    def __repr__(self):
''',
    '''async def gather_results(tasks, timeout=None):
    """Wait for all tasks and return their results in order.

    If the timeout expires, the remaining tasks are cancelled.
    """
    loop = asyncio.get_running_loop()
''',
)

PROSE_PROMPTS: tuple[str, ...] = (
    'The "import" statement\n**********************\n\n'
    'The basic import statement (no "from" clause) is executed in two steps:\n',
    "Sequence types\n**************\n\n"
    'A sequence is an ordered collection of objects. The built-in function "len()" returns',
    "Return a new list containing all items from the iterable in ascending order.\n\n"
    "The optional argument",
    "An exception is raised when the name is not found. If a class defines the method "
    '"__getattr__()",',
    "This module provides a set of classes for reading and writing files. "
    "Each object has the following methods:\n\n",
)

"""The commands of the command line, a file each. Every one of them has

EXAMPLES: command lines, as its help shows them.
KEYS: what `--json` prints, key by key: `nodes[].name` is the name of each of a list.
add_arguments(parser): its arguments.
run(arguments): does the job; what comes out, as plain data with these keys.
lines(result): the same as text, line by line.

Its docstring is its description. Torch is imported where a command runs: `--help` and completion must not wait for it.
"""

"""Completion of pyqemu-ifctl's command line in bash and zsh, written from its own parser.

`python3 -m pyqemu_ifctl.completion bash` (or zsh) prints it; `make install` puts it where the shell
looks. A verb or an option that the parser gets is completed without another word here.
"""

from __future__ import annotations

import argparse
import sys
from dataclasses import dataclass

from pyqemu_ifctl.command_line import build_parser
from pyqemu_ifctl.doctor.checks import CHECKS
from pyqemu_ifctl.main import VERBS
from pyqemu_ifctl.program import PROGRAM

TAPS, FILES, GUESTS, NETWORKS, NOTHING = "taps", "files", "vms", "networks", ""
KINDS = {"TAP": TAPS, "FILE": FILES, "VM": GUESTS, "NET": NETWORKS, "NETWORK[,...]": NETWORKS}
"""Metavar -> what is offered for it; for any other nothing is."""
WORDS = {"CHECK": tuple(check.name for check in CHECKS)}
"""Metavar -> the words to choose from, where the parser does not know them."""


@dataclass(frozen=True)
class Value:
    """What an option or an argument takes: its metavar, what is offered, or the words to choose."""

    name: str
    kind: str
    choices: tuple[str, ...] = ()


@dataclass(frozen=True)
class Option:
    """An option with its spellings and its help; `value` is None where it takes none."""

    flags: tuple[str, ...]
    about: str
    value: Value | None
    again: bool
    """Whether it may be given more than once."""


@dataclass(frozen=True)
class Verb:
    """A verb with its help, its options and its arguments; `command` where a command follows --."""

    name: str
    about: str
    options: tuple[Option, ...]
    arguments: tuple[tuple[Value, str | None], ...]
    """Each with its argparse nargs: None is one, ? is one or none, * and + are many."""
    command: bool


def describe(parser: argparse.ArgumentParser) -> tuple[Verb, ...]:
    """Return the verbs of `parser` in their order."""
    # NOTE: by the private names of argparse, which has no public ones for what a parser holds.
    found = []
    for action in parser._actions:
        if isinstance(action, argparse._SubParsersAction):
            about = {choice.dest: _help(parser, choice) for choice in action._choices_actions}
            # NOTE: a verb without help is one that the program keeps to itself.
            found += [
                _verb(name, about[name], each)
                for name, each in action.choices.items()
                if name in about
            ]
    return tuple(found)


def _help(parser: argparse.ArgumentParser, action: argparse.Action) -> str:
    """Return the help of an action as the parser would print it."""
    return parser._get_formatter()._expand_help(action) if action.help else ""


def _verb(name: str, told: str, parser: argparse.ArgumentParser) -> Verb:
    options = []
    arguments = []
    for action in parser._actions:
        if action.help == argparse.SUPPRESS:
            continue
        takes = None if action.nargs == 0 else _value(action)
        if action.option_strings:
            again = isinstance(action, argparse._AppendAction)
            about = _help(parser, action)
            options.append(Option(tuple(action.option_strings), about, takes, again))
        elif takes is not None:
            arguments.append((takes, None if action.nargs is None else str(action.nargs)))
    command = " -- " in (parser.usage or "")
    return Verb(name, told, tuple(options), tuple(arguments), command)


def _value(action: argparse.Action) -> Value:
    choices = tuple(map(str, action.choices or ()))
    name = action.metavar if isinstance(action.metavar, str) else action.dest
    return Value(name, KINDS.get(name, NOTHING), choices or WORDS.get(name, ()))


BASH = """\
# bash completion of {program}, written by pyqemu_ifctl.completion from the program's own parser

# NOTE: a tap's name may be anything that a shell takes for its own, so it is never expanded.
_{function}_offer() {{
    local each quoted
    for each; do
        [[ $each == "$word"* ]] || continue
        printf -v quoted %q "$each"
        COMPREPLY+=("$quoted")
    done
}}

_{function}_taps() {{
    local path
    for path in /sys/class/net/*/tun_flags; do
        [[ -e $path ]] || continue
        path=${{path%/tun_flags}}
        _{function}_offer "${{path##*/}}"
    done
}}

# The names of the policy's guests (vms), or networks.
_{function}_names() {{
    local each
    while read -r each; do
        _{function}_offer "$each"
    done < <({program} names "$1" 2>/dev/null)
}}

_{function}_files() {{
    compopt -o filenames 2>/dev/null
    local each
    while IFS= read -r each; do
        COMPREPLY+=("$each")
    done < <(compgen -f -- "$word")
}}

_{function}() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}}
    local verb=${{COMP_WORDS[1]}} at
    COMPREPLY=()
    if ((COMP_CWORD == 1)); then
        _{function}_offer {verbs} --help --version
        return
    fi
    for ((at = 2; at < COMP_CWORD; at++)); do
        [[ ${{COMP_WORDS[at]}} == -- ]] || continue
        case $verb in
        {commands})
            if declare -F _command_offset >/dev/null; then
                _command_offset $((at + 1))
            else
                _{function}_files
            fi
            ;;
        esac
        return
    done
    case $verb:$before in
{values}
    esac
    case $verb:$word in
{options}
{arguments}
    esac
}}
complete -F _{function} {program}
"""

ZSH = """\
#compdef {program}
# zsh completion of {program}, written by pyqemu_ifctl.completion from the program's own parser

_{program}_taps() {{
    local -a taps
    taps=(/sys/class/net/*/tun_flags(N:h:t))
    compadd -a taps
}}

_{program}_names() {{
    local -a names
    names=(${{(f)"$({program} names $1 2>/dev/null)"}})
    compadd -a names
}}

_{program}() {{
    local context state state_descr line curcontext=$curcontext
    typeset -A opt_args
    local -a verbs
    verbs=(
{verbs}
    )
    _arguments -C '(- *)'{{-h,--help}}'[show the help]' \\
        '(- *)--version[print the version]' '1:verb:->verb' '*::argument:->argument'
    case $state in
    verb)
        _describe -t verbs verb verbs
        ;;
    argument)
        case $line[1] in
{cases}
        esac
        ;;
    esac
}}

if [[ $funcstack[1] == _{program} ]]; then
    _{program} "$@"
else
    compdef _{program} {program}
fi
"""


def bash(program: str, verbs: tuple[Verb, ...]) -> str:
    """Return the completion for bash; it needs no bash-completion, but can do more with it."""
    function = program.replace("-", "_")

    def offer(value: Value) -> str:
        if value.choices:
            return f"_{function}_offer {' '.join(map(_quote, value.choices))}"
        if value.kind in (GUESTS, NETWORKS):
            return f"_{function}_names {value.kind}"
        return {TAPS: f"_{function}_taps", FILES: f"_{function}_files"}.get(value.kind, ":")

    values = []
    options = []
    arguments = []
    for verb in verbs:
        for option in verb.options:
            if option.value is not None:
                patterns = "|".join(f"{verb.name}:{flag}" for flag in option.flags)
                values.append(f"    {patterns}) {offer(option.value)}; return ;;")
        flags = [flag for option in verb.options for flag in option.flags if flag[:2] == "--"]
        flags += ["--"] if verb.command else []
        options.append(f"    {verb.name}:-*) _{function}_offer {' '.join(flags)} ;;")
        offers = dict.fromkeys(offer(value) for value, _ in verb.arguments)
        if offers:
            arguments.append(f"    {verb.name}:*) {'; '.join(offers)} ;;")
    return BASH.format(
        program=program,
        function=function,
        verbs=" ".join(verb.name for verb in verbs),
        commands="|".join(verb.name for verb in verbs if verb.command) or "''",
        values="\n".join(values),
        options="\n".join(options),
        arguments="\n".join(arguments),
    )


def zsh(program: str, verbs: tuple[Verb, ...]) -> str:
    """Return the completion for zsh, which is to be the file _PROGRAM in a folder of its fpath."""

    def offer(value: Value) -> str:
        if value.choices:
            return f"({' '.join(value.choices)})"
        if value.kind in (GUESTS, NETWORKS):
            # NOTE: without the blank, _arguments puts words of its own before ours.
            return f" _{program}_names {value.kind}"
        return {TAPS: f"_{program}_taps", FILES: "_files"}.get(value.kind, " ")

    cases = []
    for verb in verbs:
        words = []
        for option in verb.options:
            takes = ""
            if option.value is not None:
                takes = f":{_plain(option.value.name)}:{offer(option.value)}"
            before = "*" if option.again else f"({' '.join(option.flags)})"
            words += [
                _quote(f"{before}{flag}[{_plain(option.about)}]{takes}") for flag in option.flags
            ]
        for value, number in verb.arguments:
            before = {"?": "::", "*": "*:", "+": "*:"}.get(number or "", ":")
            words.append(_quote(f"{before}{_plain(value.name)}:{offer(value)}"))
        words += [_quote("*::command:_normal")] if verb.command else []
        joined = " \\\n                ".join(words)
        cases.append(f"        {verb.name})\n            _arguments -S {joined}\n            ;;")
    described = (f"        {_quote(f'{verb.name}:{_plain(verb.about)}')}" for verb in verbs)
    return ZSH.format(program=program, verbs="\n".join(described), cases="\n".join(cases))


def _quote(text: str) -> str:
    """Return `text` as one word of a shell."""
    return "'" + text.replace("'", "'\\''") + "'"


def _plain(text: str) -> str:
    """Return `text` without what _arguments and _describe of zsh take for their own."""
    return "".join(f"\\{each}" if each in "\\:[]" else each for each in text)


def main() -> int:
    """Print the completion for the shell that the one argument names."""
    verbs = describe(build_parser(VERBS))
    print({"bash": bash, "zsh": zsh}[sys.argv[1]](PROGRAM, verbs), end="")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())

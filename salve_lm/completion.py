"""Shell completion: a static script of subcommands, options and shipped config names.

jsonargparse's own generator expands every subclass of every type (over 100 MB here); this lists
each subcommand's options once and stays under 200 kB.
"""

from __future__ import annotations

import contextlib
from argparse import ArgumentParser

from salve_lm.configs import list_configs
from salve_lm.errors import NameNotFound

_BASH = """\
# bash completion for salve-lm; load it with:  source <(salve-lm completion bash)
_salve_lm() {{
    local word=${{COMP_WORDS[COMP_CWORD]}} before=${{COMP_WORDS[COMP_CWORD-1]}} command= w
    for w in "${{COMP_WORDS[@]:1:COMP_CWORD-1}}"; do
        case $w in {alternatives}) command=$w; break ;; esac
    done
    if [[ $before == --config || $before == -c ]]; then
        COMPREPLY=( $(compgen -W "{configs}" -- "$word") $(compgen -f -- "$word") )
        return
    fi
    case $command in
        "") COMPREPLY=( $(compgen -W "{commands} completion --help" -- "$word") ) ;;
{cases}
    esac
    [[ ${{#COMPREPLY[@]}} -eq 0 ]] && COMPREPLY=( $(compgen -f -- "$word") )
}}
complete -o filenames -F _salve_lm salve-lm
"""
_ZSH_PREAMBLE = "# zsh completion for salve-lm; load it with:  source <(salve-lm completion zsh)\n"


def completion_script(args: list[str]) -> str:
    """The completion script for the shell named in `args` (`bash` or `zsh`).

    Raises:
        NameNotFound: another shell.
    """
    shell = args[0] if args else "bash"
    bash = _bash_script()
    if shell == "bash":
        return bash
    if shell == "zsh":
        # zsh runs bash completions itself
        return _ZSH_PREAMBLE + "autoload -Uz bashcompinit && bashcompinit\n" + bash
    raise NameNotFound("shell", shell, ["bash", "zsh"])


def _bash_script() -> str:
    options = {name: _long_options(p) for name, p in subcommand_parsers().items()}
    cases = "\n".join(
        f'        {name}) COMPREPLY=( $(compgen -W "{" ".join(found)}" -- "$word") ) ;;'
        for name, found in options.items()
    )
    return _BASH.format(
        alternatives="|".join(options),
        commands=" ".join(options),
        configs=" ".join(list_configs()),
        cases=cases,
    )


def subcommand_parsers() -> dict[str, ArgumentParser]:
    """Subcommand -> the very parser that the command line uses for it."""
    from salve_lm.cli import SalveCLI

    class ParsersOnly(SalveCLI):
        """LightningCLI parses in its constructor; this one stops right before."""

        def parse_arguments(self, parser: ArgumentParser, args: object) -> None:
            raise StopIteration

    cli = ParsersOnly.__new__(ParsersOnly)
    with contextlib.suppress(StopIteration):
        cli.__init__([])  # type: ignore[misc]
    return dict(cli._subcommand_parsers)


def _long_options(parser: ArgumentParser) -> list[str]:
    return sorted({o for a in parser._actions for o in a.option_strings if o.startswith("--")})

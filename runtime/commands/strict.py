"""Commands that take nothing silently: an option that counts once is given once."""

from typing import Any

from typer.core import TyperGroup

from offbeat.runtime.base.errors import ConfigError


class StrictGroup(TyperGroup):
    """All commands below it refuse a repeated option of which only one could count."""

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        _strict(self)

    def invoke(self, ctx: Any) -> Any:
        """Run the command; a file that ends too soon would only be called "Aborted."."""
        try:
            return super().invoke(ctx)
        except EOFError as error:
            raise RuntimeError(f"a file or stream ended too soon: {error}") from error


def _strict(command: Any) -> None:
    for inner in getattr(command, "commands", {}).values():
        _strict(inner)
    make = command.make_parser

    def make_parser(ctx: Any) -> Any:
        parser = make(ctx)
        parse = parser.parse_args

        def parse_args(args: list[str]) -> Any:
            found = _, _, order = parse(args=args)
            for option in order:
                once = option.param_type_name == "option" and not (
                    option.multiple or option.is_flag
                )
                if once and order.count(option) > 1:
                    raise ConfigError(f"{option.opts[0]} is given more than once; only one counts")
            return found

        parser.parse_args = parse_args
        return parser

    command.make_parser = make_parser

"""The command `replicate`: one file per group of commands, and no logic in any of them."""


def main() -> None:
    """Run the command with the words of `sys.argv`."""
    from replicate.cli.command import main as run_command

    run_command()


__all__ = ["main"]

"""Every error this product raises on purpose; imports nothing.

SandboxError
├── UsageError            the command line or the host configuration asks for something that cannot be
├── AppError              what the customer handed in
│   └── ProcfileError
├── PolicyError           a value of the policy is out of range
├── HostError             this host, or a program of it, did not do what was asked
├── StackError            the stack image is missing, altered or cannot be built
├── EngineError           the engine refused, or is not there
├── ClauseError           a clause of the policy is not enforced: the start was refused
├── BuildError            the slug could not be built
└── NotFound              nothing of that name lives here
"""

from __future__ import annotations


class SandboxError(Exception):
    """What is wrong, in one sentence; ``hint`` is the next action, ``details`` foreign text shown with ``-v``.

    ``exit_code`` is what the command ends with when this error reaches the command line. ``run`` maps every
    error to 125 (the dyno could not be started by us), as docker and env do.
    """

    exit_code = 1

    def __init__(self, message: str, *, hint: str | None = None, details: str | None = None) -> None:
        super().__init__(message)
        self.message = message
        self.hint = hint
        self.details = details


class UsageError(SandboxError):
    exit_code = 2


class AppError(SandboxError):
    pass


class ProcfileError(AppError):
    pass


class PolicyError(SandboxError):
    exit_code = 2


class HostError(SandboxError):
    pass


class StackError(SandboxError):
    pass


class EngineError(SandboxError):
    pass


class ClauseError(SandboxError):
    """``clauses`` names what is not enforced, in the words that ``--waive`` takes."""

    def __init__(self, message: str, *, clauses: tuple[str, ...], hint: str | None = None) -> None:
        super().__init__(message, hint=hint)
        self.clauses = clauses


class BuildError(SandboxError):
    pass


class NotFound(SandboxError):
    pass

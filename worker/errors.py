"""Everything that can go wrong in a worker.

WorkerError
+-- ConfigError          the configuration file
+-- Refused              a job, a pipeline or a prompt that this worker does not take; the reason goes to whoever asked
+-- JobFailed            a job that was accepted and can't be finished
|   +-- PeerFault        another stage is at fault, by name
|   |   +-- BadMessage   it sent something malformed, oversized, out of order or of the wrong shape
|   |   +-- BadHandoff   its signature does not cover what it sent
|   |   +-- Stalled      it went silent
|   +-- OutOfRange       a served tensor that the law can't judge
+-- UnpinnedCertificate  a peer shows a certificate that is not the one on chain
+-- Unplannable          no assignment of layers fits the devices that were measured
+-- UnknownJob           asked about a job that is not here
"""


class WorkerError(Exception):
    """Root of this package's errors."""


class ConfigError(WorkerError, ValueError):
    pass


class Refused(WorkerError, ValueError):
    pass


class JobFailed(WorkerError):
    pass


class PeerFault(JobFailed):
    """`sender` names the peer: its stage and account."""

    def __init__(self, sender: str, what: str) -> None:
        super().__init__(f"{sender}: {what}")
        self.sender = sender
        self.what = what


class BadMessage(PeerFault):
    pass


class BadHandoff(PeerFault):
    pass


class Stalled(PeerFault):
    pass


class Silent(Stalled):
    """Nothing comes of it, which on a slow link need not be its fault."""


class OutOfRange(JobFailed):
    """`key` names the tensor ("3.q"), the rest the first value whose magnitude is not below 2^20."""

    def __init__(self, key: str, request: int, position: int, column: int) -> None:
        super().__init__(
            f"tensor {key}, request {request}, position {position}, column {column}: "
            "expected a finite value below 2^20 in magnitude"
        )
        self.key = key
        self.request = request
        self.position = position
        self.column = column


class NotRepeated(WorkerError):
    """A trace that was dropped comes out differently now that it is needed."""

    def __init__(self, job: bytes, request: int, expected: bytes, actual: bytes) -> None:
        super().__init__(
            f"job 0x{job.hex()}, request {request}: expected tensors with root 0x{expected.hex()}, computed again they "
            f"have 0x{actual.hex()}: serve with the settings, the libraries and the machine that served it"
        )


class UnpinnedCertificate(WorkerError):
    def __init__(self, sender: str, expected: bytes, actual: bytes) -> None:
        super().__init__(f"{sender}: expected the certificate with SHA-256 {expected.hex()}, came {actual.hex()}")
        self.sender = sender


class Unplannable(WorkerError, ValueError):
    pass


class UnknownJob(WorkerError, KeyError):
    def __init__(self, job: bytes) -> None:
        super().__init__(f"job 0x{job.hex()} is not at this worker")

    def __str__(self) -> str:
        return str(self.args[0])

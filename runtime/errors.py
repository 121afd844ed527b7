"""Every error that densemoe raises on purpose, in one tree.

    DensemoeError
    ├── VariantError              a variant key or field that does not parse or breaks the contract's section 8
    ├── ProblemError              shapes, dtypes, alignments or pointers of a problem
    ├── SelectionError            no variant for a problem, or a forced variant that cannot run it
    ├── RecipeError               a launch recipe with a bad expression, parameter or tensor map
    ├── ArtifactError             what lies in an artifact root
    │   ├── ArtifactNotFound      no root, no manifest, no file
    │   ├── ManifestError         a manifest that is not the schema it claims to be
    │   ├── ArtifactCorrupt       a file whose size or hash is not the manifest's
    │   ├── SignatureError        a signature that is missing, or that does not show who made the bytes
    │   └── ArchitectureMismatch  a file or set for another device
    ├── DriverError               a CUDA driver call failed: the call, the code, what to do
    │   ├── DriverUnavailable     no driver or no device
    │   └── DriverTooOld          the driver does not know this binary or call
    ├── AbiMismatch               a loaded kernel's parameters differ from the manifest's
    ├── PlanError                 a Plan used in a way it was not made for (other process, device, active list)
    ├── CheckpointError           a checkpoint's file, names, shapes or scales
    ├── ProofError                a record of a proof on hardware that is damaged or must not be merged
    ├── BuildError                the build side
    │   ├── MatrixError           build_matrix.yaml: file, line, column, value, what is allowed
    │   ├── CompileError          one variant did not compile
    │   ├── ToolchainError        another compiler than the pinned one was loaded
    │   └── AuditError            a cubin is not what its variant implies
    └── EmulatorError             a PTX program did something wrong, or something the emulator does not know

An error's message says what was given, what is allowed and what to do. Nothing is launched or written after one.
"""

from __future__ import annotations

__all__ = [
    "AbiMismatch",
    "ArchitectureMismatch",
    "ArtifactCorrupt",
    "ArtifactError",
    "ArtifactNotFound",
    "AuditError",
    "BuildError",
    "CheckpointError",
    "CompileError",
    "DensemoeError",
    "DriverError",
    "DriverTooOld",
    "DriverUnavailable",
    "EmulatorError",
    "ManifestError",
    "MatrixError",
    "PlanError",
    "ProblemError",
    "ProofError",
    "RecipeError",
    "SelectionError",
    "SignatureError",
    "ToolchainError",
    "VariantError",
]


class DensemoeError(Exception):
    """Base of every error raised by densemoe on purpose."""


class VariantError(DensemoeError, ValueError):
    """A variant key or field that does not parse, or that the contract's section 8 forbids."""


class ProblemError(DensemoeError, ValueError):
    """Shapes, dtypes, alignments or pointers that the contract does not allow."""


class SelectionError(DensemoeError, LookupError):
    """No variant can run the problem, or the one asked for cannot."""


class RecipeError(DensemoeError, ValueError):
    """A launch recipe with a bad expression, parameter or tensor map."""


class ArtifactError(DensemoeError):
    """What lies in an artifact root is not usable."""


class ArtifactNotFound(ArtifactError, FileNotFoundError):
    """No artifact root, no manifest, or no file that a manifest names."""

    def __str__(self) -> str:  # FileNotFoundError would format (errno, text) pairs
        return str(self.args[0]) if self.args else ""


class ManifestError(ArtifactError, ValueError):
    """A manifest that is not the schema it claims to be."""


class ArtifactCorrupt(ArtifactError):
    """A file whose size or sha256 differs from its manifest's."""


class SignatureError(ArtifactError):
    """A signature that is missing or no signature, of other bytes, by another signer, or not vouched for by the trusted root."""


class ArchitectureMismatch(ArtifactError):
    """A file or a set that was built for another device."""


class DriverError(DensemoeError):
    """A CUDA driver call failed.

    Attributes:
        call: name of the driver function, for example ``"cuLibraryLoadData"``.
        code: the CUresult as an integer.
    """

    def __init__(self, message: str, *, call: str = "", code: int = 0) -> None:
        super().__init__(message)
        self.call = call
        self.code = code


class DriverUnavailable(DriverError):
    """No CUDA driver on this machine, or no device that it shows."""


class DriverTooOld(DriverError):
    """The driver is older than the binary or the call needs."""


class AbiMismatch(DensemoeError):
    """A loaded kernel's parameters are not those of its manifest entry."""


class PlanError(DensemoeError):
    """A Plan was used in a way that it was not made for."""


class CheckpointError(DensemoeError, ValueError):
    """A checkpoint's file, tensor names, shapes, dtypes or scales are not what densemoe reads, or tensors are missing."""


class ProofError(DensemoeError):
    """A record of a proof on hardware that is damaged, or that must not be merged."""


class BuildError(DensemoeError):
    """The build side failed."""


class MatrixError(BuildError, ValueError):
    """build_matrix.yaml is wrong; the message starts with ``file:line:column``."""


class CompileError(BuildError):
    """One variant did not compile."""


class ToolchainError(BuildError):
    """The compiler that was loaded is not the pinned one."""


class AuditError(BuildError):
    """A cubin is not what its variant implies."""


class EmulatorError(DensemoeError):
    """A PTX program did something wrong, or something that the emulator does not know."""

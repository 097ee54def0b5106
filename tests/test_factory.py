"""package.module:factory resolves to what is there, and every way to get it wrong is told."""

import math

import pytest

from secateur.errors import SecateurError
from secateur.factory import is_path, resolve


def test_resolves_to_the_object_itself():
    assert resolve("model", "math:hypot") is math.hypot
    assert resolve("data", "pathlib:Path.cwd")() is not None
    assert is_path("a.b:c")
    assert not is_path("resnet20")


@pytest.mark.parametrize(
    ("path", "told"),
    [
        ("nosuchmodule:make", "cannot import 'nosuchmodule'"),
        ("math:nosuch", "'math' has no 'nosuch'"),
        ("math:pi", "is a float, not something to call"),
        (":make", "expected package.module:factory"),
        ("math:", "expected package.module:factory"),
    ],
)
def test_wrong_paths(path, told):
    with pytest.raises(SecateurError, match=told):
        resolve("model", path)


def test_a_module_that_fails_while_imported(tmp_path, monkeypatch):
    (tmp_path / "breaks_on_import.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SecateurError, match="ZeroDivisionError"):
        resolve("data", "breaks_on_import:make")

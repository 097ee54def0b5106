"""package.module:factory resolves to what is there, and every way to get it wrong is told."""

import math
import sys

import pytest

from secateur._internal.errors import SecateurError
from secateur._internal.importing import current_folder_importable, import_string, is_import_string


def test_resolves_to_the_object_itself():
    assert import_string("model", "math:hypot") is math.hypot
    assert import_string("data", "pathlib:Path.cwd")() is not None
    assert is_import_string("a.b:c")
    assert not is_import_string("resnet20")


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
        import_string("model", path)


def test_the_current_folder_is_importable_for_a_while_and_comes_last(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in {"", str(tmp_path)}])
    monkeypatch.chdir(tmp_path)
    (tmp_path / "nets_of_mine.py").write_text("make = dict\n")
    (tmp_path / "colorsys.py").write_text("make = dict\n")  # the standard library has one
    with pytest.raises(SecateurError, match="is its folder the current one"):
        import_string("model", "nets_of_mine:make")
    before = list(sys.path)
    with current_folder_importable():
        assert import_string("model", "nets_of_mine:make") is dict
        with pytest.raises(SecateurError, match=r"has no 'make'; the module that was found is .*colorsys\.py"):
            import_string("model", "colorsys:make")
    assert sys.path == before


def test_a_module_that_fails_while_imported(tmp_path, monkeypatch):
    (tmp_path / "breaks_on_import.py").write_text("1 / 0\n")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(SecateurError, match="ZeroDivisionError"):
        import_string("data", "breaks_on_import:make")

"""Contract under test: what the package offers is documented in Google sections, from which a reference can be made.
A function or method that takes arguments has Args, one that returns something Returns."""

import inspect

import pytest

import es_finetune


def functions():
    for name in es_finetune.__all__:
        public = getattr(es_finetune, name)
        if not inspect.isclass(public):
            yield name, public
            continue
        for attribute, value in vars(public).items():
            function = getattr(value, "__func__", value)  # of a classmethod
            if inspect.isfunction(function) and not attribute.startswith("_"):
                yield f"{name}.{attribute}", function


@pytest.mark.parametrize("name, function", [pytest.param(*each, id=each[0]) for each in functions()])
def test_a_public_function_has_the_sections_of_its_signature(name, function):
    signature, text = inspect.signature(function), inspect.getdoc(function) or ""
    assert "Args:\n" in text or not signature.parameters.keys() - {"self", "cls"}
    assert signature.return_annotation in ("None", "Iterator[None]") or "Returns:\n" in text

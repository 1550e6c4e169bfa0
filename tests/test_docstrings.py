"""What is public is shown: examples that run, types on every argument, fields that are named."""

import inspect
import re
import textwrap

import pytest

import qwen3_next
from qwen3_next import layers
from tests.support.running import BACKEND

pytestmark = pytest.mark.skipif(BACKEND != "jax", reason="once is enough")

PUBLIC = {name: getattr(qwen3_next, name) for name in qwen3_next.__all__}
PUBLIC |= {f"layers.{name}": getattr(layers, name) for name in layers.__all__}


def is_named_tuple(thing):
    return inspect.isclass(thing) and issubclass(thing, tuple)


def needs_an_example(name):
    thing = PUBLIC[name]
    return "." not in name if inspect.isfunction(thing) else not is_named_tuple(thing)


def examples(docstring):
    """The fenced blocks of Python after `Example:`."""
    _, _, rest = inspect.cleandoc(docstring or "").partition("Example:\n")
    return [
        textwrap.dedent(code) for code in re.findall(r"^ *```python\n(.*?)```", rest, re.M | re.S)
    ]


def attributes(docstring):
    """The names under `Attributes:`, not what their descriptions hold."""
    _, _, rest = inspect.cleandoc(docstring or "").partition("Attributes:\n")
    section = re.match(r"(?: .*\n?|\n)*", rest).group()
    return re.findall(r"^(\w+)\b.*?:", textwrap.dedent(section), re.M)


def is_ours(class_):
    return class_.__module__.partition(".")[0] == "qwen3_next"


def methods(class_):
    """Public methods and properties that this package adds to what a class inherits."""
    bases = inspect.getmro(class_)
    known = {name for base in bases if not is_ours(base) for name in dir(base)}
    for base in filter(is_ours, bases):
        for name, value in vars(base).items():
            value = value.fget if isinstance(value, property) else inspect.unwrap(value)
            value = getattr(value, "__func__", value)
            if inspect.isfunction(value) and not name.startswith("_") and name not in known:
                yield name, value


def functions():
    """`{dotted name: function}` of everything public that can be called, and properties."""
    found = {}
    for name, thing in PUBLIC.items():
        if inspect.isfunction(thing):
            found[name] = thing
        elif inspect.isclass(thing):
            found |= {f"{name}.{method}": value for method, value in methods(thing)}
    return found


def without_types(function):
    """Names of the arguments, and `return`, that have no type."""
    signature = inspect.signature(function)
    names = [p.name for p in signature.parameters.values() if p.annotation is p.empty]
    names += ["return"] * (signature.return_annotation is signature.empty)
    return [name for name in names if name not in ("self", "cls")]


@pytest.mark.parametrize("name", filter(needs_an_example, PUBLIC))
def test_the_example_runs_as_written(name, tmp_path, monkeypatch):
    blocks = examples(PUBLIC[name].__doc__)
    assert blocks, f"the docstring of {name} has no `Example:` with a block of Python"
    monkeypatch.chdir(tmp_path)
    names = {}
    for block in blocks:
        exec(compile(block, f"example of {name}", "exec"), names)


@pytest.mark.parametrize("name", functions())
def test_every_argument_and_result_has_a_type(name):
    assert without_types(functions()[name]) == []


@pytest.mark.parametrize("name", filter(lambda name: is_named_tuple(PUBLIC[name]), PUBLIC))
def test_every_field_of_a_tuple_is_described(name):
    assert set(PUBLIC[name]._fields) <= set(attributes(PUBLIC[name].__doc__))


def test_what_is_missing_is_found():
    def half(a: int, b):
        """Half.

        Example:

        ```python
        half(1, 2)
        ```

        Attributes:
            a: First,
                with more: to say.
            b: Second.

        Returns:
            c: nothing.
        """

    assert without_types(half) == ["b", "return"]
    assert examples(half.__doc__) == ["half(1, 2)\n"]
    assert examples("Example:\n    none") == []
    assert attributes(half.__doc__) == ["a", "b"]

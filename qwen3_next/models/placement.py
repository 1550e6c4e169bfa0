"""Whether the weights of a model live where the active distribution of Keras has its devices.

A variable gets its place when it is made. Keras only warns of a model that was made before the
distribution it is used under, and JAX copies all of its weights to every device; one that outlives
its distribution would be compiled for a mesh that its layers do not know of.
"""

import keras


def check_placement(model: keras.Model) -> None:
    """Raises `ValueError` for a model made under another distribution than the active one."""
    if keras.backend.backend() != "jax":
        return  # no other backend has places
    active = keras.distribution.distribution()
    mesh = None if active is None else active.device_mesh
    for variable in model.variables:
        found = _mesh_of(variable)
        if found is not mesh and not _same(found, mesh):
            raise ValueError(
                f"A model must be used under the distribution that it was made under. {_way(found)}"
                f" Received: {model.name!r}, whose `{variable.path}` was made with "
                f"{_text(found)}, under {_text(mesh)}"
            )


def _mesh_of(variable):
    layout = getattr(variable, "_layout", None)
    # Keras' own layouts know their mesh of devices, those of JAX that of the backend.
    return getattr(layout, "device_mesh", getattr(layout, "mesh", None))


def _same(found, mesh):
    return None not in (found, mesh) and _backend(found) == _backend(mesh)


def _backend(mesh):
    return getattr(mesh, "backend_mesh", mesh)


def _way(found):
    if found is None:
        return "Call `distribute` before the model is made, or load it again from a file."
    return "Set that one with `keras.distribution.set_distribution`, or load the model anew."


def _text(mesh):
    if mesh is None:
        return "no distribution"
    names, sizes = mesh.axis_names, getattr(mesh, "axis_sizes", None) or mesh.shape
    return f"a mesh {','.join(f'{name}={size}' for name, size in zip(names, sizes))}"

"""Where arrays live: the device mesh, and logical axis names mapped onto it.

mesh.py       the `Mesh` spec (sizes by axis name) and the `jax.sharding.Mesh` it makes
rules.py      `ShardingRules` (logical axis -> mesh axes) and `Layout`, mesh and rules
              together, which every module that places an array takes
placement.py  rows on the host to global arrays on the mesh
processes.py  several processes as one: who speaks, what all must agree on

    layout = Layout(make_mesh(Mesh(fsdp=-1)), ShardingRules())
    x_BTD = layout.constrain(x_BTD, "batch", "sequence", "embed")
"""

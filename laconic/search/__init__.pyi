# The public names: `from ._<id> import Name as Name`, sorted by module. `laconic new` adds its own.

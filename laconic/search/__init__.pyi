# The public names: `from ._<id> import Name as Name`, sorted by module. `laconic new` adds its own.
from ._aging_evolution import AgingEvolution as AgingEvolution
from ._space import Space as Space
from ._study import Strategy as Strategy
from ._study import Trial as Trial
from ._study import study as study

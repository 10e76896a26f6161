# The public names: `from ._<id> import Name as Name`, sorted by module. `laconic new` adds its own.
from ._adamp import SGDP as SGDP
from ._adamp import AdamP as AdamP
from ._adamp import adamp as adamp
from ._adamp import invariant_rows as invariant_rows
from ._adamp import sgdp as sgdp
from ._muon import Muon as Muon
from ._muon import muon as muon
from ._muon import muon_groups as muon_groups
from ._rmt_lr import BatchSizeLR as BatchSizeLR
from ._rmt_lr import batch_eigenvalue as batch_eigenvalue
from ._rmt_lr import scale_lr as scale_lr

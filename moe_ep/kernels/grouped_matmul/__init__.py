"""Products of sorted rows with the matrix of their group, and the expert MLP made of them."""

from moe_ep.kernels.grouped_matmul.api import ExpertWeights as ExpertWeights
from moe_ep.kernels.grouped_matmul.api import expert_mlp as expert_mlp
from moe_ep.kernels.grouped_matmul.api import grouped_matmul as grouped_matmul
from moe_ep.kernels.grouped_matmul.groups import RowGroups as RowGroups
from moe_ep.kernels.grouped_matmul.groups import StaticRows as StaticRows
from moe_ep.kernels.grouped_matmul.groups import first_rows as first_rows
from moe_ep.kernels.grouped_matmul.groups import make_row_groups as make_row_groups
from moe_ep.kernels.grouped_matmul.groups import one_group as one_group
from moe_ep.kernels.grouped_matmul.groups import tiles_needed as tiles_needed

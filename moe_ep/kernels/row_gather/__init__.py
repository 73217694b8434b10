"""Rows by index: copied, or added up by weight."""

from moe_ep.kernels.row_gather.api import gather_rows as gather_rows
from moe_ep.kernels.row_gather.api import weighted_sum_rows as weighted_sum_rows

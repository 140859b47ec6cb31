//! The model as its callers see it: plans in, tokens and logits out, on every number of ranks.

mod common;
mod goldens;
mod invariance;
mod overlap;
mod plans;

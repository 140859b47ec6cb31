//! Every op of every CPU level against the plain backend, and what attention promises bit for bit.

mod attention;
mod common;
mod experts;
mod paged;
mod plans;
mod rows;

//! The forward pass on the host's backends against the reference implementations, on every family
//! and every rank count.

use crate::common::exact;
use kernels::plain::Plain;
use models::{IN_F32, NAMES, check, staged};

#[test]
fn the_plain_backend_agrees_with_the_reference_implementations() {
    assert_eq!(check(&NAMES, &|_| Plain, staged, IN_F32), Ok(()));
}

#[test]
fn the_cpu_backend_agrees_with_the_reference_implementations() {
    assert_eq!(check(&NAMES, &|_| exact(), staged, IN_F32), Ok(()));
}

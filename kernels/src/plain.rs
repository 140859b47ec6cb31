//! The plain, obviously correct ops: the oracle that tests compare every backend with.

pub mod dequant;

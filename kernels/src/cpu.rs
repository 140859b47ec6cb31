//! The CPU backend.

pub mod isa;
pub mod linear;
pub mod pool;

pub use isa::Isa;
pub use pool::Pool;

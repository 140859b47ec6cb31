//! The CPU backend.

pub mod isa;
pub mod pool;

pub use isa::Isa;
pub use pool::Pool;

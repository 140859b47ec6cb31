//! The target with the fewest sequences.

use super::{RouteKey, RoutingPolicy, Target};

/// Takes the first of the least loaded targets.
#[derive(Debug, Default)]
pub struct LeastLoaded;

impl RoutingPolicy for LeastLoaded {
    fn pick(&self, _: &RouteKey, targets: &[Target]) -> Option<usize> {
        (0..targets.len()).min_by_key(|&at| targets[at].load)
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_first_of_the_least_loaded_is_taken() {
        let targets = [3, 1, 2, 1].map(|load| Target { id: 0, load, cached: 0 });
        assert_eq!(LeastLoaded.pick(&RouteKey::default(), &targets), Some(1));
        assert_eq!(LeastLoaded.pick(&RouteKey::default(), &[]), None);
    }
}

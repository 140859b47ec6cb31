//! What a group will take of its devices, reckoned before anything is loaded.

#[cfg(any(test, feature = "cuda"))]
pub(crate) mod card;
pub(crate) mod layout;

use kernels::BLOCK_TOKENS;
use layout::{Layout, Place};

/// What the ranks of a device take, and what it has.
pub(crate) fn told(layout: &Layout, place: &Place) -> String {
    let ranks = &layout.ranks[place.ranks.clone()];
    let sum =
        |part: fn(&layout::RankMemory) -> u64| ranks.iter().map(part).fold(0, u64::saturating_add);
    let (weights, scratch, kv) = (sum(|r| r.weights), sum(|r| r.scratch), sum(|r| r.kv));
    let who = match place.ranks.len() {
        1 => format!("rank {}", place.ranks.start),
        _ => format!("ranks {} to {}", place.ranks.start, place.ranks.end - 1),
    };
    let tokens = layout.options.blocks * BLOCK_TOKENS;
    format!(
        "{who} on {}: weights {} + KV cache {} ({tokens} tokens of {} bytes) + scratch {} = {}, \
         available are {} ({})",
        place.name,
        human(weights),
        human(kv),
        kv / (tokens as u64).max(1),
        human(scratch),
        human(layout.taken(place)),
        human(place.bytes),
        place.source,
    )
}

/// Bytes for people: `1.5 GB`, `98 MB`.
pub(crate) fn human(bytes: u64) -> String {
    match bytes {
        1_000_000_000.. => format!("{:.1} GB", bytes as f64 / 1e9),
        1_000_000.. => format!("{:.0} MB", bytes as f64 / 1e6),
        _ => format!("{:.0} kB", bytes as f64 / 1e3),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn sizes_read_well() {
        assert_eq!(human(98_362_432), "98 MB");
        assert_eq!(human(1_540_000_000), "1.5 GB");
        assert_eq!(human(900), "1 kB");
    }
}

//! Bytes that several threads of the host make.

use std::{num::NonZero, sync::OnceLock, thread};

/// More add little: memory is as fast as it is.
const THREADS_MAX: usize = 8;

/// Calls `fill` for shares of `to` of at least `least` bytes, of whole `unit`s, each on a thread of
/// its own. It hears where its share begins.
pub(super) fn by_shares(
    to: &mut [u8],
    (unit, least): (usize, usize),
    fill: impl Fn(usize, &mut [u8]) + Sync,
) {
    static CORES: OnceLock<usize> = OnceLock::new();
    let cores = *CORES.get_or_init(|| thread::available_parallelism().map_or(1, NonZero::get));
    let shares = (to.len() / least.max(1)).clamp(1, cores.min(THREADS_MAX));
    let each = to.len().div_ceil(shares).next_multiple_of(unit.max(1));
    if each >= to.len() {
        return fill(0, to);
    }
    thread::scope(|scope| {
        let (own, others) = to.split_at_mut(each);
        for (at, share) in others.chunks_mut(each).enumerate() {
            let fill = &fill;
            scope.spawn(move || fill((at + 1) * each, share));
        }
        fill(0, own);
    });
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn shares_are_whole_units_and_all_of_it() {
        for (len, unit, least) in [(0, 8, 64), (24, 24, 1), (1000, 8, 1), (999 * 7, 7, 100)] {
            let mut to = vec![0; len];
            by_shares(&mut to, (unit, least), |start, share| {
                assert!(start.is_multiple_of(unit) && share.len().is_multiple_of(unit));
                for (at, byte) in share.iter_mut().enumerate() {
                    *byte += ((start + at) % 251) as u8 + 1;
                }
            });
            assert!(to.iter().enumerate().all(|(at, byte)| usize::from(*byte) == at % 251 + 1));
        }
    }
}

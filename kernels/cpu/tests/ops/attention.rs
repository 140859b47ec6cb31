//! Attention against the plain one, and what it promises bit for bit.

use cpu::{Cpu, CpuConfig, Isa, Precision};
use kernels::plain::Plain;

use crate::common::{assert_close, assert_same_bits, devices};
use crate::paged::{Paged, heads};

#[test]
fn attention_is_the_plain_one() {
    let shapes = [heads(9, 3, 64), heads(1, 1, 128), heads(8, 1, 32), heads(14, 2, 64)];
    let devices = devices();
    let odd = [heads(4, 2, 48), heads(2, 2, 96), heads(5, 1, 2), heads(40, 1, 10)];
    for (seed, heads) in shapes.into_iter().chain(odd).enumerate() {
        let paged = Paged::new(heads, &[1, 15, 16, 17, 63, 64, 65, 130], seed as u64);
        let batches: [&[(usize, std::ops::Range<usize>)]; 5] = [
            &[(0, 0..1)],
            &[(7, 129..130), (3, 16..17), (1, 14..15)],
            &[(7, 0..130)],
            &[(0, 0..1), (4, 5..63), (2, 16..16), (5, 63..64), (6, 1..65), (1, 0..15)],
            &[],
        ];
        for (i, rows) in batches.into_iter().enumerate() {
            for window in [None, Some([1, 16][i % 2]), Some(37)] {
                let want = paged.attend(&Plain, rows, window);
                // Every level and precision, one of the thread counts.
                for (name, device) in devices.iter().skip((seed + i) % 3).step_by(3) {
                    let got = paged.attend(device, rows, window);
                    let name = format!("{name} {heads:?} {rows:?} {window:?}");
                    assert_close(&name, &got, &want, 5e-6);
                }
            }
        }
    }
}

#[test]
fn attention_over_a_long_context_is_the_plain_one() {
    let paged = Paged::new(heads(6, 2, 64), &[5000], 3);
    for window in [None, Some(700)] {
        let rows = [(0, 4990..5000)];
        let want = paged.attend(&Plain, &rows, window);
        for (name, device) in devices() {
            assert_close(&name, &paged.attend(&device, &rows, window), &want, 5e-6);
        }
    }
}

#[test]
fn scores_far_apart_stay_finite() {
    let mut paged = Paged::new(heads(2, 1, 16), &[100], 5);
    // Scores of up to 1e6: all weight falls on one key, wherever it stands.
    paged.qkv[0].iter_mut().for_each(|x| *x *= 512.0);
    let want = paged.attend(&Plain, &[(0, 90..100)], None);
    for (name, device) in devices() {
        assert_close(&name, &paged.attend(&device, &[(0, 90..100)], None), &want, 1e-4);
    }
}

#[test]
fn a_rows_attention_depends_on_nothing_else() {
    for (heads, window) in [
        (heads(9, 3, 64), None),
        (heads(7, 1, 64), Some(50)),
        (heads(2, 2, 48), Some(65)),
        (heads(8, 2, 128), None),
    ] {
        let contexts = [200, 70, 1, 33];
        let paged = Paged::new(heads, &contexts, 11);
        let cols = heads.q * heads.dim;
        for precision in [Precision::Fast, Precision::Exact] {
            let cpu = |isa, threads| Cpu::new(CpuConfig { threads, precision, isa }).unwrap();
            let whole = paged.attend(&cpu(Isa::Amx, 1), &[(0, 0..200)], window);
            for (isa, threads) in Isa::ALL.into_iter().zip([3, 1, 2, 3]) {
                let device = cpu(isa, threads);
                let name = format!("{isa:?} {precision:?} {threads} {heads:?}");
                let again = paged.attend(&device, &[(0, 0..200)], window);
                assert_same_bits(&name, &again, &whole);
                for chunk in [1, 7, 64] {
                    let start = 200 - chunk;
                    let rows = [(1, 3..70), (0, start..200), (2, 0..1), (3, 30..33)];
                    let among = paged.attend(&device, &rows, window);
                    let among = &among[67 * cols..][..chunk * cols];
                    assert_same_bits(&name, among, &whole[start * cols..]);
                    let alone = paged.attend(&device, &rows[1..2], window);
                    assert_same_bits(&name, &alone, &whole[start * cols..]);
                }
            }
        }
    }
}

#[test]
fn a_later_key_that_is_not_a_number_leaves_earlier_rows_alone() {
    let heads = heads(4, 2, 32);
    let mut paged = Paged::new(heads, &[40], 2);
    let clean = paged.attend(&Plain, &[(0, 0..40)], None);
    let cols = heads.qkv_cols();
    paged.qkv[0][38 * cols + heads.q * heads.dim..39 * cols].fill(f32::NAN);
    let out_cols = heads.q * heads.dim;
    for (name, device) in devices() {
        let got = paged.attend(&device, &[(0, 0..40)], None);
        assert_close(&name, &got[..38 * out_cols], &clean[..38 * out_cols], 5e-6);
        assert!(got[38 * out_cols..].iter().all(|x| x.is_nan()), "{name}");
    }
}

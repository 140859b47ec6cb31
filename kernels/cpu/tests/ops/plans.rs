//! Wrong plans are errors, and sizes are as told.

use cpu::{Cpu, CpuConfig, Isa, Precision};
use kernels::{Backend, Batch, Heads, KernelError, Rotation, Tensor, plain::Plain};

use crate::common::{ints, no_turn};
use crate::paged::{Paged, heads};

/// The message of the shape error that `outcome` must be.
#[track_caller]
fn refused(outcome: Result<(), KernelError>) -> String {
    match outcome {
        Err(KernelError::Shape(error)) => error.to_string(),
        other => panic!("expected a shape error, got {other:?}"),
    }
}

fn wrong_plans_are_errors_on<B: Backend>(d: &B) {
    let heads = heads(2, 1, 16);
    let cols = heads.qkv_cols();
    let paged = Paged::new(heads, &[20], 1);
    let rows = [(0, 18..20)];
    let mut kv = paged.cache(d, &[20]);
    let qkv = paged.rows(d, &rows);
    let mut out = Tensor::zeros(d, 2, 32).unwrap();
    let batch = || paged.batch(d, &rows);

    let cos_sin = no_turn(d, heads.dim);
    let rotation = Rotation { norm: None, cos_sin: &cos_sin, heads };
    let mut rotate =
        |batch| d.rotate_and_store(&mut kv, &mut paged.rows(d, &rows), &rotation, &batch);
    let bad = Batch { slots: ints(d, &[0, 16 * paged.blocks as i32]), ..batch() };
    assert_eq!(refused(rotate(bad)), "rotate_and_store: slot 80 is outside 0..80");
    refused(rotate(Batch { slots: ints(d, &[-1, 0]), ..batch() }));
    refused(rotate(Batch { slots: ints(d, &[1]), ..batch() }));
    let bad = Batch { rope_rows: ints(d, &[0, 1]), ..batch() };
    assert_eq!(refused(rotate(bad)), "rotate_and_store: table row 1 is outside 0..1");

    let mut attend = |batch: Batch<B>| d.attention(&mut out, &qkv, &kv, &batch, heads, None);
    attend(batch()).unwrap();
    refused(attend(Batch { context_lens: ints(d, &[1]), ..batch() }));
    refused(attend(Batch { context_lens: ints(d, &[400]), ..batch() }));
    refused(attend(Batch { context_lens: ints(d, &[-1]), ..batch() }));
    refused(attend(Batch { row_starts: ints(d, &[0, 1]), ..batch() }));
    refused(attend(Batch { row_starts: ints(d, &[2, 2]), ..batch() }));
    refused(attend(Batch { row_starts: ints(d, &[0, 9]), ..batch() }));
    refused(attend(Batch { positions: ints(d, &[18, 18]), ..batch() }));
    refused(attend(Batch { block_tables: ints(d, &[0, 5, 0]), ..batch() }));
    refused(attend(Batch { block_tables: ints(d, &[0]), ..batch() }));
    refused(d.attention(&mut out, &qkv, &kv, &batch(), heads, Some(0)));
    let other = Heads { kv: 2, q: 4, dim: 8 };
    refused(d.attention(&mut out, &qkv, &kv, &batch(), other, None));
    refused(d.kv(1, Heads { q: 3, kv: 2, dim: 8 }).map(|_| ()));
    refused(d.kv(1, Heads { q: 2, kv: 2, dim: 7 }).map(|_| ()));

    let mut x = Tensor::from_host(d, cols, &vec![0.0; 2 * cols]).unwrap();
    let bad = Batch { logit_rows: ints(d, &[0, 2]), logit_rows_len: 2, ..batch() };
    let mut picked = Tensor::zeros(d, 2, cols).unwrap();
    refused(d.gather_rows(&mut picked, &x, &bad, 0, 2));
    refused(d.gather_rows(&mut picked, &x, &bad, 1, 2));
    refused(d.gather_rows(&mut picked, &x, &bad, usize::MAX, 2));
    x.rows = 3;
    let delta = Tensor::zeros(d, 3, cols).unwrap();
    assert!(refused(d.add(&mut x, &delta)).contains("allocation"));
    refused(d.write_floats(&mut d.floats(1).unwrap(), &[0.0; 2]));
    refused(d.read_floats(&mut [0.0; 2], &d.floats(1).unwrap()));
}

#[test]
fn wrong_plans_are_errors() {
    wrong_plans_are_errors_on(&Plain);
    let (threads, isa) = (2, Isa::detect());
    for precision in [Precision::Fast, Precision::Exact] {
        wrong_plans_are_errors_on(&Cpu::new(CpuConfig { threads, precision, isa }).unwrap());
    }
    let none = Cpu::new(CpuConfig { threads: 0, precision: Precision::Fast, isa });
    assert!(matches!(none.err(), Some(KernelError::Device(_))));
}

#[test]
fn a_block_takes_the_bytes_it_is_said_to() {
    let (threads, isa) = (1, Isa::detect());
    let heads = heads(2, 2, 64);
    for (precision, bytes) in [(Precision::Fast, 2), (Precision::Exact, 4)] {
        let device = Cpu::new(CpuConfig { threads, precision, isa }).unwrap();
        assert_eq!(device.kv_block_bytes(heads), 2 * 2 * 64 * 16 * bytes);
        assert!(device.kv(usize::MAX / 64, heads).is_err());
    }
}

//! What a weight is said to take on the device is what it takes.

#[path = "common/counting.rs"]
mod counting;

use counting::Counting;
use cuda::{Cuda, CudaConfig, Driver, WeightFormat};
use half::f16;
use kernels::{
    Backend, Format, Grouped, Groups, IntegerShape, PartShape, Random, RandomFormat, Scaled,
    Stored, Tensor, WeightPart,
};

/// Matrices of one stack, of the shapes given.
fn parts(shapes: &[PartShape]) -> Vec<WeightPart<'static>> {
    let part = |shape: &PartShape| {
        let PartShape { rows, cols, ref integers } = *shape;
        let Some(IntegerShape { bits, groups, count }) = integers.clone() else {
            return WeightPart::plain(Format::F16, rows, cols, vec![0; 2 * rows * cols]);
        };
        let scales = vec![f16::ONE; rows * count];
        let values = vec![0; rows * Grouped::row_bytes(bits, cols)].into();
        let grouped = Grouped { bits, values, groups, scales, zeros: vec![1; rows * count] };
        WeightPart { rows, cols, stored: Stored::Grouped(grouped) }
    };
    shapes.iter().map(part).collect()
}

fn integers(rows: usize, cols: usize, bits: usize, groups: Groups) -> PartShape {
    let count = (0..cols).map(|k| groups.of(k)).max().unwrap_or(0) + 1;
    PartShape { rows, cols, integers: Some(IntegerShape { bits, groups, count }) }
}

fn numbers(rows: usize, cols: usize) -> PartShape {
    PartShape { rows, cols, integers: None }
}

#[derive(Clone, Copy)]
enum As {
    Weight,
    GateUp,
    Table,
}

fn held(weights: WeightFormat, parts: &[WeightPart<'_>], uploaded: As) -> u64 {
    let device = Cuda::new(Counting::new(), CudaConfig { weights, ..CudaConfig::default() });
    let weight = match uploaded {
        As::Weight => device.weight(parts),
        As::GateUp => device.gate_up(parts),
        As::Table => device.table(parts),
    };
    let _weight = weight.expect("an upload");
    device.driver().held() as u64
}

fn stacks() -> Vec<Vec<PartShape>> {
    let runs = |size| Groups::Runs { size, first: 0 };
    let turned = |k: usize| (k * 7 % 12) as u32;
    vec![
        vec![numbers(48, 64)],
        vec![numbers(40, 64), numbers(8, 64)],
        vec![numbers(40, 72)],
        vec![integers(512, 256, 4, runs(128))],
        vec![integers(72, 136, 4, runs(32)), integers(24, 136, 4, runs(32))],
        vec![integers(8, 512, 4, runs(512))],
        vec![integers(64, 384, 4, Groups::Listed((0..384).map(turned).collect()))],
        // What the kernels of integers do not take is rounded.
        vec![integers(64, 256, 8, runs(128))],
        vec![integers(12, 256, 4, runs(128))],
        vec![integers(64, 96, 4, runs(96)), integers(64, 96, 4, runs(32))],
    ]
}

#[test]
fn a_weight_takes_the_bytes_it_is_said_to() {
    for shapes in stacks() {
        let parts = parts(&shapes);
        for format in [WeightFormat::Bf16, WeightFormat::Fp8] {
            for uploaded in [As::Weight, As::GateUp] {
                let held = held(format, &parts, uploaded);
                assert_eq!(held, format.bytes(&shapes), "{format:?} {shapes:?}");
            }
            let table = held(format, &parts, As::Table);
            assert_eq!(table, WeightFormat::table_bytes(&shapes), "a table");
        }
    }
    let scaled = Scaled { values: vec![0; 64 * 32].into(), run: 32, scales: vec![1.0; 64] };
    let scaled = [WeightPart { rows: 64, cols: 32, stored: Stored::Scaled(scaled) }];
    // One record of 64 by 64, and eight counters.
    assert_eq!(held(WeightFormat::Bf16, &scaled, As::Weight), 2 * 64 * 64 + 32);
    assert_eq!(WeightFormat::Bf16.bytes(&[numbers(64, 32)]), 2 * 64 * 64 + 32);
}

#[test]
fn experts_take_the_bytes_they_are_said_to() {
    for shapes in stacks().into_iter().filter(|shapes| shapes[0].rows % 8 == 0) {
        let parts = parts(&shapes);
        for weights in [WeightFormat::Bf16, WeightFormat::Fp8] {
            let device =
                Cuda::new(Counting::new(), CudaConfig { weights, ..CudaConfig::default() });
            let mut both = [
                device.experts(3, &shapes).expect("room"),
                device.expert_gate_ups(3, &shapes).expect("room"),
            ];
            for experts in &mut both {
                (0..3).for_each(|_| device.push_expert(experts, &parts).expect("an upload"));
            }
            let wanted = 6 * weights.expert_bytes(&shapes);
            assert_eq!(device.driver().held() as u64, wanted, "{weights:?} {shapes:?}");
        }
    }
    // Of other experts' integers nothing is known: they are rounded.
    let groups = Groups::Runs { size: 128, first: 0 };
    let (integers, other) = ([integers(64, 256, 4, groups)], [numbers(64, 256)]);
    let bytes = |stack| WeightFormat::Bf16.expert_bytes(stack);
    assert_eq!((bytes(&integers), bytes(&other)), (64 * (128 + 8), 64 * 512));
    let device = Cuda::new(Counting::new(), CudaConfig::default());
    let mut experts = device.experts(1, &other).expect("room");
    device.push_expert(&mut experts, &parts(&integers)).expect("an upload");
    assert_eq!(device.driver().held() as u64, bytes(&other));
}

#[test]
fn integers_take_about_a_quarter_of_bf16() {
    let stack = [integers(4096, 4096, 4, Groups::Runs { size: 128, first: 0 })];
    let (packed, widened) = (WeightFormat::Bf16.bytes(&stack), WeightFormat::table_bytes(&stack));
    assert!(packed < widened / 3 && packed > widened / 4, "{packed} of {widened}");
}

#[test]
fn a_weight_that_the_device_makes_takes_as_many() {
    let format = RandomFormat::Int4 { group: 128 };
    let random = Random { seed: 1, first_row: 0, first_col: 64, format };
    let part = WeightPart { rows: 72, cols: 136, stored: Stored::Random(random) };
    let groups = Groups::Runs { size: 128, first: 64 };
    let bytes = WeightFormat::Bf16.bytes(&[integers(72, 136, 4, groups)]);
    assert_eq!(held(WeightFormat::Bf16, &[part], As::Weight), bytes);
}

/// Products of up to 192 rows are made of records as they lie, those of more of what is unpacked.
#[test]
fn products_take_the_workspace_they_are_said_to() {
    for (shapes, weights) in stacks()
        .into_iter()
        .flat_map(|shapes| [(shapes.clone(), WeightFormat::Bf16), (shapes, WeightFormat::Fp8)])
    {
        let config = CudaConfig { weights, ..CudaConfig::default() };
        let (rows, cols): (usize, _) =
            (shapes.iter().map(|shape| shape.rows).sum(), shapes[0].cols);
        for most in [1, 9, 40, 64, 65, 192, 193, 5000] {
            let device = Cuda::new(Counting::new(), config);
            let weight = device.weight(&parts(&shapes)).expect("an upload");
            let gate_up = device.gate_up(&parts(&shapes)).expect("an upload");
            let products = device.driver().facts().fp8_products();
            let wanted = match config.product_bytes(&shapes, most, products) {
                0 => 0,
                bytes => bytes.next_power_of_two(),
            };
            let before = device.driver().held();
            let steps = || [1, 64, 192, most].into_iter().filter(|m| *m <= most);
            // Halves of whole vectors, which `gated` wants.
            if rows % 16 == 0 {
                for m in steps() {
                    let x = Tensor::zeros(&device, m, cols).expect("x");
                    let mut room = Tensor::zeros(&device, m, rows).expect("room");
                    let mut out = Tensor::zeros(&device, m, rows / 2).expect("out");
                    device.gated(&mut out, &mut room, &x, &gate_up).expect("a product");
                }
                let held = device.driver().held() - before;
                assert_eq!(held, wanted, "gated, {most} rows by {weights:?} {shapes:?}");
            }
            for m in steps() {
                let x = Tensor::zeros(&device, m, cols).expect("x");
                let mut out = Tensor::zeros(&device, m, rows).expect("out");
                device.linear(&mut out, &x, &weight, None).expect("a product");
            }
            let held = device.driver().held() - before;
            assert_eq!(held, wanted, "up to {most} rows by {weights:?} {shapes:?}");
        }
    }
}

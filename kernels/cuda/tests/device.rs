//! The code that talks to NVIDIA's driver, against one in host memory (`emulate::machine`): what
//! goes there comes back, what is wrong is refused in words, and nothing waits for ever.
#![cfg(feature = "cuda")]

use cuda::{Driver, Element, Gemm, Gpu, GpuConfig, Launch, Scales};
use kernels::KernelError;
use std::time::{Duration, Instant};

/// On one card of 512 MiB.
fn on_the_fake(test: &str, settings: &[(&str, &str)], body: impl FnOnce()) {
    let settings = [&[("FAKE_MEMORY_MIB", "512")], settings].concat();
    emulate::on_machine(test, 1, &settings, body);
}

fn open() -> Result<Gpu, KernelError> {
    Gpu::open(GpuConfig::with_limit(0, Duration::from_secs(60)))
}

/// For devices that hang.
fn impatient() -> Gpu {
    Gpu::open(GpuConfig::with_limit(0, Duration::from_millis(100))).unwrap()
}

fn refused<T>(result: Result<T, KernelError>) -> String {
    result.err().expect("an error").to_string()
}

fn noise(len: usize) -> Vec<u8> {
    (0..len as u32).map(|at| (at.wrapping_mul(2_654_435_761) >> 13) as u8).collect()
}

fn add(gpu: &Gpu, threads: u32, shared: u32) -> Result<(), KernelError> {
    gpu.launch(Launch::new("add_bf16", [3, 1, 1], threads, &[0u64; 3]).shared(shared))
}

#[test]
fn bytes_come_back_as_they_went() {
    on_the_fake("bytes_come_back_as_they_went", &[], || {
        let gpu = open().unwrap();
        let free = gpu.free_bytes().unwrap();
        let (large, copy) =
            (gpu.zeroed("a test", 19 << 20).unwrap(), gpu.zeroed("a test", 19 << 20).unwrap());
        assert_eq!(free - gpu.free_bytes().unwrap(), 38 << 20);
        let mut got = vec![1; 19 << 20];
        gpu.read(&mut got, &large, 0).unwrap();
        assert!(got.iter().all(|byte| *byte == 0), "memory is not cleared");
        // More than all staging memory holds, then many small pieces into the middle of it.
        let mut wanted = noise(19 << 20);
        gpu.write(&large, 0, &wanted).unwrap();
        for at in 0..700 {
            let piece = noise(at + 1);
            gpu.write(&large, 10_007 * at, &piece).unwrap();
            wanted[10_007 * at..][..piece.len()].copy_from_slice(&piece);
        }
        // Made in place, and more than there is place for.
        for (at, bytes) in [(77, 5), (1 << 20, 7 << 20), (3 << 20, 8 << 20), (99, 17 << 20)] {
            let made = noise(bytes);
            let mut fill = |to: &mut [u8]| to.copy_from_slice(&made);
            gpu.write_with(&large, at, bytes, &mut fill).unwrap();
            wanted[at..][..bytes].copy_from_slice(&made);
        }
        gpu.copy(&copy, (&large, 0), 19 << 20).unwrap();
        gpu.read(&mut got, &copy, 0).unwrap();
        assert!(got == wanted, "what came back is not what went");
        let mut some = vec![0; 1000];
        gpu.read(&mut some, &copy, 12_345).unwrap();
        assert_eq!(some, wanted[12_345..][..1000]);
        gpu.copy(&copy, (&large, 77), 100).unwrap();
        gpu.read(&mut some[..100], &copy, 0).unwrap();
        assert_eq!(some[..100], wanted[77..177]);
        let text = refused(gpu.copy(&copy, (&large, 77), 19 << 20));
        assert!(text.contains("19922944 bytes at 77 of an allocation"), "{text}");
        for outside in [(0, (19 << 20) + 1), (19 << 20, 1), (usize::MAX, 2)] {
            let text = refused(gpu.read(&mut vec![0; outside.1], &large, outside.0));
            assert!(text.contains("of an allocation of 19922944"), "{text}");
        }
        drop((large, copy));
        assert_eq!(gpu.free_bytes().unwrap(), free);
    });
}

#[test]
fn launches_are_checked_before_the_device_sees_them() {
    on_the_fake("launches_are_checked_before_the_device_sees_them", &[], || {
        let gpu = open().unwrap();
        add(&gpu, 256, 0).unwrap();
        add(&gpu, 256, 100 << 10).unwrap();
        let text = refused(gpu.launch(Launch::new("no_such", [1, 1, 1], 32, &0u64)));
        assert!(text.contains("kernel no_such: this build has none of the name"), "{text}");
        let text = refused(gpu.launch(Launch::new("add_bf16", [1, 1, 1], 32, &0u64)));
        assert!(text.contains("it takes 24 bytes of arguments, not 8"), "{text}");
        let text = refused(add(&gpu, 256, 228 << 10));
        assert!(text.contains("233472 bytes of shared memory; the device has 232448"), "{text}");
        // None of these reached the device.
        add(&gpu, 256, 0).unwrap();
        let text = refused(add(&gpu, 0, 0));
        let wanted = "launching add_bf16 on 3×1×1 blocks of 0: CUDA_ERROR_INVALID_VALUE";
        assert!(text.contains(wanted), "{text}");
        assert!(refused(add(&gpu, 256, 0)).contains("device 0 is out of use since this"));
    });
}

#[test]
fn a_device_without_memory_is_told_and_goes_on() {
    on_the_fake("a_device_without_memory_is_told_and_goes_on", &[], || {
        let gpu = open().unwrap();
        let text = refused(gpu.zeroed("a weight", 1 << 30));
        assert_eq!(text, "cannot allocate 1073741824 bytes for a weight");
        gpu.zeroed("a weight", 0).unwrap();
        add(&gpu, 256, 0).unwrap();
    });
}

#[test]
fn a_device_that_hangs_is_given_up_in_time() {
    let settings = [("FAKE_HANG", "add_bf16")];
    on_the_fake("a_device_that_hangs_is_given_up_in_time", &settings, || {
        let gpu = impatient();
        let memory = gpu.zeroed("a test", 64).unwrap();
        add(&gpu, 256, 0).unwrap();
        let start = Instant::now();
        let text = refused(gpu.read(&mut [0; 8], &memory, 0));
        assert!(start.elapsed() < Duration::from_secs(5));
        let wanted = "the device has not finished within 0.1 s; the last kernel was add_bf16";
        assert!(text.contains(wanted), "{text}");
        assert!(refused(gpu.write(&memory, 0, &[1])).contains("out of use"));
        assert!(refused(gpu.zeroed("a test", 1)).contains("out of use"));
    });
}

#[test]
fn giving_back_what_a_hung_device_uses_does_not_wait_for_ever() {
    let settings = [("FAKE_HANG", "add_bf16")];
    on_the_fake("giving_back_what_a_hung_device_uses_does_not_wait_for_ever", &settings, || {
        let gpu = impatient();
        let memory = gpu.zeroed("a test", 64).unwrap();
        add(&gpu, 256, 0).unwrap();
        let start = Instant::now();
        // On another thread, as a worker's tensors are.
        std::thread::spawn(|| drop((memory, gpu))).join().unwrap();
        assert!(start.elapsed() < Duration::from_secs(5));
    });
}

#[test]
fn a_fault_names_itself_and_the_last_kernel() {
    let settings = [("FAKE_FAULT", "add_bf16")];
    on_the_fake("a_fault_names_itself_and_the_last_kernel", &settings, || {
        let gpu = open().unwrap();
        let memory = gpu.zeroed("a test", 64).unwrap();
        add(&gpu, 256, 0).unwrap();
        let text = refused(gpu.read(&mut [0; 8], &memory, 0));
        for part in ["CUDA_ERROR_ILLEGAL_ADDRESS", "CUDA_LAUNCH_BLOCKING=1", "was add_bf16"] {
            assert!(text.contains(part), "{text}");
        }
        assert!(refused(add(&gpu, 256, 0)).contains("CUDA_ERROR_ILLEGAL_ADDRESS"));
    });
}

#[test]
fn an_old_driver_is_told_with_the_remedy() {
    on_the_fake("an_old_driver_is_told_with_the_remedy", &[("FAKE_VERSION", "12020")], || {
        let text = refused(open());
        assert!(text.contains("too old: it speaks CUDA 12.2, this build needs 1"), "{text}");
        assert!(text.contains("release 580 or newer"), "{text}");
    });
}

#[test]
fn machines_without_a_device_are_told() {
    on_the_fake("machines_without_a_device_are_told", &[("FAKE_DEVICES", "0")], || {
        assert!(refused(open()).contains("look at nvidia-smi and CUDA_VISIBLE_DEVICES"));
    });
}

#[test]
fn devices_that_no_kernel_fits_are_told() {
    on_the_fake("devices_that_no_kernel_fits_are_told", &[("FAKE_MAJOR", "7")], || {
        let text = refused(open());
        assert!(text.contains("fake 0 has compute capability 7.0; kernels need 8.0"), "{text}");
        let second = refused(Gpu::open(GpuConfig::new(1)));
        assert!(second.contains("there is no device 1: they are 0 to 0"), "{second}");
    });
}

/// A product whose sums, scales and bias are exact in bf16, so that every way to it gives the same
/// bits: x and weight are -1, 0 or 1, scales powers of two.
struct Exact {
    shape: (usize, usize, usize),
    fp8: bool,
    bias: bool,
    out: Element,
}

impl Exact {
    fn small(at: usize) -> f32 {
        [0.0, 1.0, 0.0, -1.0, 0.0, 0.0, 1.0][at.wrapping_mul(7919) % 61 % 7]
    }

    fn scale(at: usize) -> f32 {
        [1.0, 0.5, 2.0][at % 3]
    }

    fn uploaded(&self, gpu: &Gpu, len: usize, seed: usize) -> <Gpu as Driver>::Memory {
        let value = |at| Self::small(at + seed);
        let codes = |at| match value(at) {
            0.0 => 0u8,
            value => {
                if value > 0.0 {
                    0x38
                } else {
                    0xb8
                }
            }
        };
        let wide = |at| half::bf16::from_f32(value(at)).to_le_bytes();
        let bytes: Vec<u8> = match self.fp8 {
            true => (0..len).map(codes).collect(),
            false => (0..len).flat_map(wide).collect(),
        };
        memory(gpu, &bytes)
    }

    fn wanted(&self, row: usize, col: usize) -> f32 {
        let (_, _, k) = self.shape;
        let term = |i| Self::small(row * k + i + 1) * Self::small(col * k + i + 2);
        let sum: f32 = (0..k).map(term).sum();
        let scales = if self.fp8 { Self::scale(row) * Self::scale(col + 1) } else { 1.0 };
        sum * scales + if self.bias { (col % 5) as f32 } else { 0.0 }
    }

    fn check(&self, gpu: &Gpu) {
        let (m, n, k) = self.shape;
        let (x, weight) = (self.uploaded(gpu, m * k, 1), self.uploaded(gpu, n * k, 2));
        let floats = |len: usize, first: usize| -> Vec<u8> {
            (first..first + len).flat_map(|at| Self::scale(at).to_le_bytes()).collect()
        };
        let scales = (memory(gpu, &floats(m, 0)), memory(gpu, &floats(n, 1)));
        let bias: Vec<u8> =
            (0..n).flat_map(|col| half::bf16::from_f32((col % 5) as f32).to_le_bytes()).collect();
        let bias = memory(gpu, &bias);
        let out = memory(gpu, &vec![0xff; m * n * self.out.bytes()]);
        let at = |memory| gpu.address(memory);
        let scales = Scales { x: at(&scales.0), weight: at(&scales.1) };
        gpu.gemm(Gemm {
            out: at(&out),
            out_element: self.out,
            x: at(&x),
            weight: at(&weight),
            scales: self.fp8.then_some(scales),
            bias: self.bias.then(|| at(&bias)),
            m,
            n,
            k,
        })
        .unwrap();
        let mut got = vec![0; m * n * self.out.bytes()];
        gpu.read(&mut got, &out, 0).unwrap();
        let got: Vec<f32> = match self.out {
            Element::F32 => got.as_chunks().0.iter().map(|b| f32::from_le_bytes(*b)).collect(),
            Element::Bf16 => {
                got.as_chunks().0.iter().map(|b| half::bf16::from_le_bytes(*b).to_f32()).collect()
            }
        };
        let wanted: Vec<f32> = (0..m * n).map(|at| self.wanted(at / n, at % n)).collect();
        let Self { fp8, bias, out, .. } = self;
        assert_eq!(got, wanted, "{m} rows, fp8 {fp8}, bias {bias}, {out:?}");
    }
}

fn memory(gpu: &Gpu, bytes: &[u8]) -> <Gpu as Driver>::Memory {
    let memory = gpu.zeroed("a test", bytes.len()).unwrap();
    gpu.write(&memory, 0, bytes).unwrap();
    memory
}

/// Every kind of product at several numbers of rows, twice; what was told of ways around.
fn products() -> Vec<String> {
    let gpu = open().unwrap();
    for rows in [1, 5, 3, 8, 5, 20, 1] {
        let shape = (rows, 48, 64);
        for (fp8, bias) in [(false, false), (false, true), (true, false), (true, true)] {
            Exact { shape, fp8, bias, out: Element::Bf16 }.check(&gpu);
        }
        for fp8 in [false, true] {
            Exact { shape, fp8, bias: false, out: Element::F32 }.check(&gpu);
        }
    }
    gpu.products().1
}

#[test]
fn products_need_no_way_around_where_the_library_has_them() {
    on_the_fake("products_need_no_way_around_where_the_library_has_them", &[], || {
        assert_eq!(products(), Vec::<String>::new());
    });
}

#[test]
fn an_algorithm_refused_at_other_rows_is_asked_for_anew() {
    let settings = [("FAKE_ALGORITHMS", "exact")];
    on_the_fake("an_algorithm_refused_at_other_rows_is_asked_for_anew", &settings, || {
        assert_eq!(products(), Vec::<String>::new());
    });
}

#[test]
fn refused_biases_and_scales_are_applied_by_a_kernel() {
    let settings = [("FAKE_REFUSES", "bias,scales")];
    on_the_fake("refused_biases_and_scales_are_applied_by_a_kernel", &settings, || {
        let told = products();
        let ours = |line: &String| line.ends_with("scales and bias by a kernel of our own");
        assert!(!told.is_empty() && told.iter().all(ours), "{told:?}");
        assert!(told.iter().any(|line| line.contains("in bf16 to bf16 with a bias")), "{told:?}");
        assert!(told.iter().any(|line| line.contains("in fp8 to f32:")), "{told:?}");
    });
}

#[test]
fn refused_products_in_fp8_are_widened() {
    let settings = [("FAKE_REFUSES", "fp8,bias")];
    on_the_fake("refused_products_in_fp8_are_widened", &settings, || {
        let told = products();
        let widened: Vec<_> = told.iter().filter(|line| line.contains("widened")).collect();
        assert!(!widened.is_empty() && widened.iter().all(|l| l.contains("in fp8")), "{told:?}");
    });
}

/// Sums of 37 MB, and 144 rows of a weight of 256 KB each in bf16: more than the room there is for
/// either at a time.
#[test]
fn ways_around_go_by_pieces_where_products_are_large() {
    let settings = [("FAKE_REFUSES", "fp8,bias")];
    on_the_fake("ways_around_go_by_pieces_where_products_are_large", &settings, || {
        let gpu = open().unwrap();
        let of = |shape, fp8, bias, out| Exact { shape, fp8, bias, out };
        of((70, 131_072, 16), false, true, Element::Bf16).check(&gpu);
        of((3, 144, 131_072), true, false, Element::F32).check(&gpu);
        assert_eq!(gpu.products().1.len(), 2);
    });
}

#[test]
fn a_product_that_nothing_computes_is_refused_and_the_device_goes_on() {
    let settings = [("FAKE_REFUSES", "rows:5")];
    on_the_fake(
        "a_product_that_nothing_computes_is_refused_and_the_device_goes_on",
        &settings,
        || {
            let gpu = open().unwrap();
            let some = memory(&gpu, &[0; 4096]);
            let at = gpu.address(&some);
            let (out_element, scales, bias) = (Element::Bf16, None, None);
            let gemm =
                Gemm { out: at, out_element, x: at, weight: at, scales, bias, m: 5, n: 16, k: 16 };
            let text = refused(gpu.gemm(gemm));
            assert!(text.contains("no algorithm for a product of 5 rows by [16, 16]"), "{text}");
            gpu.gemm(Gemm { m: 4, ..gemm }).unwrap();
        },
    );
}

#[test]
fn what_is_measured_before_a_weight_comes_changes_no_result() {
    let settings = [("FAKE_CANDIDATES", "3")];
    on_the_fake("what_is_measured_before_a_weight_comes_changes_no_result", &settings, || {
        let gpu = open().unwrap();
        let free = gpu.free_bytes().unwrap();
        for fp8 in [false, true] {
            gpu.expect_products((48, 64), fp8).unwrap();
        }
        // More than the machine has: nothing is measured, and nothing is wrong.
        gpu.expect_products((1 << 14, 1 << 15), false).unwrap();
        assert_eq!(gpu.free_bytes().unwrap(), free);
        for (fp8, bias) in [(false, true), (true, false)] {
            Exact { shape: (7, 48, 64), fp8, bias, out: Element::Bf16 }.check(&gpu);
        }
    });
}

/// Code that is loaded by its first launch waits for all that runs.
#[test]
fn no_launch_waits_for_a_kernel_that_hangs() {
    let settings = [("FAKE_HANG", "add_bf16")];
    on_the_fake("no_launch_waits_for_a_kernel_that_hangs", &settings, || {
        let gpu = open().unwrap();
        add(&gpu, 256, 0).unwrap();
        let (send, receive) = std::sync::mpsc::channel();
        std::thread::spawn(move || {
            let launched = gpu.launch(Launch::new("silu_mul_bf16", [3, 1, 1], 256, &[0u64; 3]));
            send.send(launched.is_ok()).unwrap();
            // Dropping it would wait until the deadline.
            std::mem::forget(gpu);
        });
        assert_eq!(receive.recv_timeout(Duration::from_secs(20)), Ok(true));
    });
}

#[repr(C)]
#[derive(Clone, Copy)]
struct AddArgs {
    x: u64,
    delta: u64,
    vectors: u64,
}

/// 8 times `value` in bf16, which small whole numbers are without loss.
fn eight(value: f32) -> Vec<u8> {
    (0..8).flat_map(|_| half::bf16::from_f32(value).to_le_bytes()).collect()
}

/// Two pieces of memory, and a launch that adds the second to the first.
fn sum(gpu: &Gpu) -> (<Gpu as Driver>::Memory, <Gpu as Driver>::Memory, AddArgs) {
    let (x, delta) = (memory(gpu, &eight(1.0)), memory(gpu, &eight(2.0)));
    let args = AddArgs { x: gpu.address(&x), delta: gpu.address(&delta), vectors: 1 };
    (x, delta, args)
}

fn add_once(gpu: &Gpu, args: &AddArgs) {
    gpu.launch(Launch::new("add_bf16", [1, 1, 1], 256, args)).unwrap();
}

fn held(gpu: &Gpu, memory: &<Gpu as Driver>::Memory) -> Vec<u8> {
    let mut bytes = vec![0; 16];
    gpu.read(&mut bytes, memory, 0).unwrap();
    bytes
}

#[test]
fn captured_launches_run_when_they_are_replayed_and_not_before() {
    on_the_fake("captured_launches_run_when_they_are_replayed_and_not_before", &[], || {
        let gpu = open().unwrap();
        let (x, _delta, args) = sum(&gpu);
        gpu.begin_capture().unwrap();
        let text = refused(gpu.begin_capture());
        assert!(text.contains("a capture within another"), "{text}");
        add_once(&gpu, &args);
        add_once(&gpu, &args);
        let graph = gpu.end_capture().unwrap();
        assert_eq!(held(&gpu, &x), eight(1.0));
        gpu.replay(&graph).unwrap();
        assert_eq!(held(&gpu, &x), eight(5.0));
        add_once(&gpu, &args);
        gpu.replay(&graph).unwrap();
        gpu.replay(&graph).unwrap();
        assert_eq!(held(&gpu, &x), eight(15.0));
        let text = refused(gpu.end_capture());
        assert!(text.contains("no capture to end"), "{text}");
    });
}

#[test]
fn memory_is_left_alone_while_launches_are_captured() {
    on_the_fake("memory_is_left_alone_while_launches_are_captured", &[], || {
        let gpu = open().unwrap();
        let (x, _delta, args) = sum(&gpu);
        gpu.begin_capture().unwrap();
        for (what, result) in [
            ("taking memory", gpu.zeroed("a test", 16).map(drop)),
            ("writing", gpu.write(&x, 0, &[0; 16])),
            ("reading", gpu.read(&mut [0; 16], &x, 0)),
            ("reading", gpu.begin_read(&x, 0, 16).map(drop)),
        ] {
            let text = refused(result);
            assert!(text.contains(&format!("{what} while launches are captured")), "{text}");
        }
        add_once(&gpu, &args);
        let graph = gpu.end_capture().unwrap();
        gpu.replay(&graph).unwrap();
        assert_eq!(held(&gpu, &x), eight(3.0));
    });
}

#[test]
fn bytes_are_read_as_they_were_when_asked_for() {
    on_the_fake("bytes_are_read_as_they_were_when_asked_for", &[], || {
        let gpu = open().unwrap();
        let (x, _delta, args) = sum(&gpu);
        // Places are used again, larger and smaller ones.
        for round in 0..3 {
            let before = gpu.begin_read(&x, 0, 16).unwrap();
            add_once(&gpu, &args);
            let behind = gpu.begin_read(&x, 2, 2).unwrap();
            add_once(&gpu, &args);
            let first = 1.0 + 4.0 * round as f32;
            assert_eq!(gpu.end_read(before).unwrap(), eight(first));
            assert_eq!(gpu.end_read(behind).unwrap(), eight(first + 2.0)[..2]);
        }
        assert!(refused(gpu.begin_read(&x, 8, 9)).contains("9 bytes at 8 of an allocation of 16"));
    });
}

//! The code that talks to NVIDIA's driver, against one in host memory (`emulate::machine`): what
//! goes there comes back, what is wrong is refused in words, and nothing waits for ever.
#![cfg(feature = "cuda")]

use cuda::{Driver, Gpu, GpuConfig, Launch};
use kernels::KernelError;
use std::time::{Duration, Instant};

fn on_the_fake(test: &str, settings: &[(&str, &str)], body: impl FnOnce()) {
    emulate::on_machine(test, 1, settings, body);
}

fn open() -> Result<Gpu, KernelError> {
    Gpu::open(GpuConfig { wait_limit: Duration::from_millis(100), ..GpuConfig::new(0) })
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
        let gpu = open().unwrap();
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
        let gpu = open().unwrap();
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

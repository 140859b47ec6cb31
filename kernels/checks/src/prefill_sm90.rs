//! Prefill attention by wgmma: what is asked of the kernel for every device, and the places where
//! this one has seams: steps of 128 keys, rings of three slots (two of e4m3, filled from four
//! stages), warpgroups of 64 rows.

use crate::{
    BF16, Check, Device,
    paged::Case,
    prefill::{On, agree, company, lengths, spans, spans_company, tiles, windows},
};
use cuda::{Driver, KvFormat, PrefillKernel};

pub fn checks<D: Driver>() -> Vec<Check<D>> {
    vec![
        Check {
            name: "wgmma prefill: rows and prefixes about blocks' ends",
            run: |device| on_wgmma(device, KvFormat::Bf16, lengths),
        },
        Check {
            name: "wgmma prefill: several tiles",
            run: |device| on_wgmma(device, KvFormat::Bf16, tiles),
        },
        Check {
            name: "wgmma prefill: windows",
            run: |device| on_wgmma(device, KvFormat::Bf16, windows),
        },
        Check {
            name: "wgmma prefill: other company, other chunks",
            run: |device| on_wgmma(device, KvFormat::Bf16, company),
        },
        Check {
            name: "wgmma prefill: steps and rings",
            run: |device| on_wgmma(device, KvFormat::Bf16, steps),
        },
        Check {
            name: "wgmma prefill: spans of keys",
            run: |device| on_wgmma(device, KvFormat::Bf16, spans),
        },
        Check {
            name: "wgmma prefill: spans, other company",
            run: |device| on_wgmma(device, KvFormat::Bf16, spans_company),
        },
        Check {
            name: "wgmma prefill, e4m3: rows and prefixes about blocks' ends",
            run: |device| on_wgmma(device, KvFormat::Fp8, lengths),
        },
        Check {
            name: "wgmma prefill, e4m3: several tiles",
            run: |device| on_wgmma(device, KvFormat::Fp8, tiles),
        },
        Check {
            name: "wgmma prefill, e4m3: windows",
            run: |device| on_wgmma(device, KvFormat::Fp8, windows),
        },
        Check {
            name: "wgmma prefill, e4m3: other company, other chunks",
            run: |device| on_wgmma(device, KvFormat::Fp8, company),
        },
        Check {
            name: "wgmma prefill, e4m3: steps, rings and stages",
            run: |device| on_wgmma(device, KvFormat::Fp8, steps),
        },
        Check {
            name: "wgmma prefill, e4m3: spans of keys",
            run: |device| on_wgmma(device, KvFormat::Fp8, spans),
        },
    ]
}

/// Runs a check with this kernel chosen; nothing on devices that have no wgmma.
fn on_wgmma<D: Driver>(
    device: Device<'_, D>,
    format: KvFormat,
    check: fn(Device<'_, D>, On) -> Result<(), String>,
) -> Result<(), String> {
    if device(BF16).driver().facts().compute_capability != (9, 0) {
        return Ok(());
    }
    check(device, (PrefillKernel::Wgmma, format))
}

/// One to eight steps, so that rings go round and parities turn; contexts that end about a step's
/// end, and windows that begin there.
fn steps<D: Driver>(device: Device<'_, D>, on: On) -> Result<(), String> {
    for case in [
        Case::new((1, 1, 64), &[(900, 64), (126, 2), (127, 2), (253, 3)]),
        Case::new((1, 1, 128), &[(640, 66), (383, 2)]),
        Case::new((2, 1, 64), &[(700, 128)]).window(128),
        Case::new((1, 1, 64), &[(511, 65)]).window(129),
    ] {
        agree(device, on, &case)?;
    }
    Ok(())
}

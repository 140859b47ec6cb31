//! Which vector instructions the machine has, found out once.
//!
//! The levels are ordered: a machine that has one has all below it. A caller may ask for less than
//! the machine has, never for more.

use serde::{Deserialize, Serialize};
use std::sync::OnceLock;

/// A level of vector instructions.
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord, Hash, Serialize, Deserialize)]
pub enum Isa {
    /// Whatever the compiler's baseline is.
    Portable,
    /// AVX2, FMA and F16C.
    Avx2,
    /// AVX-512 F, BW, DQ, VL and VNNI.
    Avx512,
    /// AVX-512 and AMX tiles with int8 and bf16 products, and the kernel's permission to use them.
    Amx,
}

impl Isa {
    /// Every level, lowest first.
    pub const ALL: [Self; 4] = [Self::Portable, Self::Avx2, Self::Avx512, Self::Amx];

    /// The highest level that this machine and its kernel offer.
    pub fn detect() -> Self {
        static DETECTED: OnceLock<Isa> = OnceLock::new();
        *DETECTED.get_or_init(detect)
    }

    pub fn name(self) -> &'static str {
        match self {
            Self::Portable => "portable",
            Self::Avx2 => "avx2",
            Self::Avx512 => "avx512",
            Self::Amx => "amx",
        }
    }
}

#[cfg(not(target_arch = "x86_64"))]
fn detect() -> Isa {
    Isa::Portable
}

#[cfg(target_arch = "x86_64")]
fn detect() -> Isa {
    let avx2 = is_x86_feature_detected!("avx2")
        && is_x86_feature_detected!("fma")
        && is_x86_feature_detected!("f16c");
    let avx512 = avx2
        && is_x86_feature_detected!("avx512f")
        && is_x86_feature_detected!("avx512bw")
        && is_x86_feature_detected!("avx512dq")
        && is_x86_feature_detected!("avx512vl")
        && is_x86_feature_detected!("avx512vnni");
    if avx512 && amx::offered() {
        Isa::Amx
    } else if avx512 {
        Isa::Avx512
    } else if avx2 {
        Isa::Avx2
    } else {
        Isa::Portable
    }
}

#[cfg(target_arch = "x86_64")]
mod amx {
    use std::arch::x86_64::__cpuid_count;

    /// AMX-BF16, AMX-TILE and AMX-INT8 of CPUID leaf 7 (EDX).
    const FEATURES: u32 = 1 << 22 | 1 << 24 | 1 << 25;

    /// Whether the processor has tiles and this process may use them.
    pub fn offered() -> bool {
        __cpuid_count(7, 0).edx & FEATURES == FEATURES && permitted()
    }

    /// Tile data makes a thread's saved state 8 KiB larger, so Linux wants to be asked once a
    /// process.
    #[cfg(target_os = "linux")]
    fn permitted() -> bool {
        const ARCH_PRCTL: isize = 158;
        const ARCH_REQ_XCOMP_PERM: usize = 0x1023;
        const XFEATURE_XTILEDATA: usize = 18;
        let mut result = ARCH_PRCTL;
        // SAFETY: the request takes two integers and touches no memory of ours; a system call
        // clobbers rcx and r11.
        unsafe {
            std::arch::asm!(
                "syscall",
                inout("rax") result,
                in("rdi") ARCH_REQ_XCOMP_PERM,
                in("rsi") XFEATURE_XTILEDATA,
                lateout("rcx") _,
                lateout("r11") _,
                options(nostack),
            );
        }
        result == 0
    }

    #[cfg(not(target_os = "linux"))]
    fn permitted() -> bool {
        false
    }
}

#[cfg(test)]
mod tests {
    use super::Isa;

    #[test]
    fn levels_are_ordered_and_named_apart() {
        assert!(Isa::ALL.windows(2).all(|pair| pair[0] < pair[1]));
        assert!(Isa::ALL.windows(2).all(|pair| pair[0].name() != pair[1].name()));
        assert_eq!(Isa::detect(), Isa::detect());
    }
}

//! Cards by name: what their data sheets say.

/// One kind of card.
#[derive(Clone, Copy, Debug, PartialEq)]
pub struct Hardware {
    /// As `--gpu` takes it.
    pub name: &'static str,
    /// A word of the driver's own name for it.
    driver_name: &'static str,
    /// Major and minor.
    pub compute_capability: (u32, u32),
    /// What the driver says that there is.
    pub memory_bytes: u64,
    /// Bytes a second by the data sheet.
    pub bandwidth: f64,
    /// Bytes a second that a copy reads and writes, measured for H100 and H200, else 88 % of the
    /// data sheet.
    pub copy_bandwidth: f64,
    /// Operations a second of products in bf16 without sparsity, by the data sheet.
    pub bf16_peak: f64,
    /// As `bf16_peak`, in e4m3, where products here take it.
    pub fp8_peak: Option<f64>,
}

impl Hardware {
    /// # Errors
    /// The names that there are.
    pub fn named(name: &str) -> Result<&'static Self, String> {
        let found = HARDWARE.iter().find(|card| card.name.eq_ignore_ascii_case(name));
        found.ok_or_else(|| {
            let names: Vec<&str> = HARDWARE.iter().map(|card| card.name).collect();
            format!("no card {name:?} is known; known are {}", names.join(", "))
        })
    }

    /// The kind of a card that the driver calls `name` and that has `memory_bytes`.
    pub fn of_card(name: &str, memory_bytes: u64) -> Option<&'static Self> {
        let words = |card: &&Self| name.split([' ', '-']).any(|word| word == card.driver_name);
        // Cards of one name differ by their memory.
        HARDWARE.iter().filter(words).min_by_key(|card| card.memory_bytes.abs_diff(memory_bytes))
    }

    /// Whether products take e4m3 with scales by row, as `cuda::Facts::fp8_products`.
    pub fn fp8_products(&self) -> bool {
        self.compute_capability.0 == 9
    }
}

const fn gib(tenths: u64) -> u64 {
    (tenths << 30) / 10
}

/// Gigabytes a second, and 10^12 operations a second.
const GB: f64 = 1e9;
const TERA: f64 = 1e12;

/// All that are known.
pub const HARDWARE: [Hardware; 9] = [
    Hardware {
        name: "h100",
        driver_name: "H100",
        compute_capability: (9, 0),
        memory_bytes: gib(791),
        bandwidth: 3350.0 * GB,
        copy_bandwidth: 3000.0 * GB,
        bf16_peak: 989.0 * TERA,
        fp8_peak: Some(1979.0 * TERA),
    },
    Hardware {
        name: "h200",
        driver_name: "H200",
        compute_capability: (9, 0),
        memory_bytes: gib(1397),
        bandwidth: 4800.0 * GB,
        copy_bandwidth: 4300.0 * GB,
        bf16_peak: 989.0 * TERA,
        fp8_peak: Some(1979.0 * TERA),
    },
    Hardware {
        name: "h20",
        driver_name: "H20",
        compute_capability: (9, 0),
        memory_bytes: gib(950),
        bandwidth: 4000.0 * GB,
        copy_bandwidth: 0.88 * 4000.0 * GB,
        bf16_peak: 148.0 * TERA,
        fp8_peak: Some(296.0 * TERA),
    },
    Hardware {
        name: "a100-40",
        driver_name: "A100",
        compute_capability: (8, 0),
        memory_bytes: gib(394),
        bandwidth: 1555.0 * GB,
        copy_bandwidth: 0.88 * 1555.0 * GB,
        bf16_peak: 312.0 * TERA,
        fp8_peak: None,
    },
    Hardware {
        name: "a100-80",
        driver_name: "A100",
        compute_capability: (8, 0),
        memory_bytes: gib(791),
        bandwidth: 2039.0 * GB,
        copy_bandwidth: 0.88 * 2039.0 * GB,
        bf16_peak: 312.0 * TERA,
        fp8_peak: None,
    },
    Hardware {
        name: "l40s",
        driver_name: "L40S",
        compute_capability: (8, 9),
        memory_bytes: gib(443),
        bandwidth: 864.0 * GB,
        copy_bandwidth: 0.88 * 864.0 * GB,
        bf16_peak: 362.0 * TERA,
        fp8_peak: None,
    },
    Hardware {
        name: "l4",
        driver_name: "L4",
        compute_capability: (8, 9),
        memory_bytes: gib(220),
        bandwidth: 300.0 * GB,
        copy_bandwidth: 0.88 * 300.0 * GB,
        bf16_peak: 121.0 * TERA,
        fp8_peak: None,
    },
    Hardware {
        name: "a10",
        driver_name: "A10",
        compute_capability: (8, 6),
        memory_bytes: gib(219),
        bandwidth: 600.0 * GB,
        copy_bandwidth: 0.88 * 600.0 * GB,
        bf16_peak: 125.0 * TERA,
        fp8_peak: None,
    },
    Hardware {
        name: "rtx-4090",
        driver_name: "4090",
        compute_capability: (8, 9),
        memory_bytes: gib(236),
        bandwidth: 1008.0 * GB,
        copy_bandwidth: 0.88 * 1008.0 * GB,
        bf16_peak: 165.0 * TERA,
        fp8_peak: None,
    },
];

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn cards_are_known_by_both_their_names() {
        let named = |name| Hardware::named(name).expect(name).name;
        assert_eq!((named("h200"), named("L40S")), ("h200", "l40s"));
        let error = Hardware::named("v100").expect_err("too old");
        assert!(HARDWARE.iter().all(|card| error.contains(card.name)), "{error}");
        let of = |name, gb: u64| Hardware::of_card(name, gb << 30).map(|card| card.name);
        assert_eq!(of("NVIDIA H200", 139), Some("h200"));
        assert_eq!(of("NVIDIA H100 80GB HBM3", 79), Some("h100"));
        assert_eq!(of("NVIDIA A100-SXM4-40GB", 39), Some("a100-40"));
        assert_eq!(of("NVIDIA A100-SXM4-80GB", 79), Some("a100-80"));
        assert_eq!(of("NVIDIA L4", 22), Some("l4"));
        assert_eq!(of("NVIDIA GeForce RTX 4090", 24), Some("rtx-4090"));
        assert_eq!(of("Tesla T4", 16), None);
    }
}

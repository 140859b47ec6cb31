//! Every kernel compiles for every target, spills no register, and uses the instructions that it
//! was written for. Reads what the compiler and the disassembler say; runs nothing.

#[path = "../../cuda/build/toolchain.rs"]
mod toolchain;

use std::{
    collections::{BTreeMap, BTreeSet},
    fs,
    path::{Path, PathBuf},
    process::Command,
    thread,
};

/// Start of a kernel's name, the targets it concerns, and opcodes that its machine code must hold.
/// The longest start that fits counts, for each target.
const MEANT: &[(&str, &[&str], &[&str])] = &[
    ("attention_decode", &["sm_80"], &["HMMA", "LDSM", "LDGSTS"]),
    // The launch behind may begin, and the wait for those before.
    ("attention_decode", &["sm_90a"], &["HMMA", "LDSM", "LDGSTS", "PREEXIT", "ACQBULK"]),
    ("rms_norm", &["sm_90a"], &["PREEXIT", "ACQBULK"]),
    ("add_rms_norm", &["sm_90a"], &["PREEXIT", "ACQBULK"]),
    ("peer_", &["sm_90a"], &["PREEXIT", "ACQBULK"]),
    ("quantize_rows", &["sm_90a"], &["PREEXIT", "ACQBULK"]),
    ("attention_prefill", &BOTH, &["HMMA", "LDSM", "LDGSTS"]),
    ("experts_", &["sm_90a"], &["PREEXIT", "ACQBULK"]),
    // Weights by 16 bytes a lane, or in bulk beside x; barriers in shared memory, and arrivals
    // behind copies.
    ("skinny_linear", &["sm_80"], &["HMMA", "LDGSTS", "ARRIVES"]),
    ("skinny_linear", &["sm_90a"], &RECORDS),
    ("expert_linear", &["sm_80"], &["HMMA", "LDGSTS", "ARRIVES"]),
    ("expert_linear", &["sm_90a"], &RECORDS),
    ("attention_prefill_sm90", &["sm_90a"], &WGMMA),
    ("attention_prefill_sm90_d64_fp8", &["sm_90a"], &WGMMA_OF_WIDENED),
    ("attention_prefill_sm90_d128_fp8", &["sm_90a"], &WGMMA_OF_WIDENED),
];

/// Kernels that copy from global memory before they wait for the launches before (`ACQBULK`), by
/// these instructions.
const AHEAD: &[(&str, &str)] = &[("attention_decode", "LDGSTS"), ("skinny_linear", "UBLKCP")];

const BOTH: [&str; 2] = ["sm_80", "sm_90a"];

/// Products of records: the launch behind may begin, and the wait for those before.
const RECORDS: [&str; 7] = ["HMMA", "LDGSTS", "ARRIVES", "UBLKCP", "SYNCS", "PREEXIT", "ACQBULK"];
/// Products, copies, barriers in shared memory and arrivals behind copies, the fence before
/// products of what was copied, and registers that change hands.
const WGMMA: [&str; 6] = ["HGMMA", "LDGSTS", "SYNCS", "ARRIVES", "FENCE", "USETMAXREG"];
/// As [`WGMMA`], but copies are waited for, and what they brought is widened: HADD2 makes f32 of
/// f16.
const WGMMA_OF_WIDENED: [&str; 7] =
    ["HGMMA", "LDGSTS", "DEPBAR", "HADD2", "SYNCS", "FENCE", "USETMAXREG"];
/// What a thread of 384 starts with: registers that change hands are counted on it, and the
/// compiler may give a kernel fewer.
const REGISTERS_OF_384: u32 = 65536 / 384 / 8 * 8;

/// What a thread of 288 may have: of their nine warps three share the 16384 of a scheduler.
const REGISTERS_OF_288: u32 = 16384 / (3 * 32) / 8 * 8;

/// Of products of records, with one weight and by expert.
const OF_RECORDS: [&str; 2] = ["skinny_linear_", "expert_linear_"];
/// Those whose loop over records is one piece of code, and bytes of a record: eight warps must have
/// issued it for four records before memory brings the next four.
const KEEPS_UP: &[(&str, u32)] = &[
    ("bf16_t8", 8192),
    ("bf16_t16", 8192),
    ("bf16_t32", 8192),
    ("bf16_t64", 8192),
    ("e4m3_t8", 8192),
    ("e4m3_t16", 8192),
    ("e4m3_t32", 8192),
    ("e4m3_t64", 8192),
    ("int4_g128_t8", 4352),
    ("int4_g128_t16", 4352),
    ("int4_g128_t32", 4352),
    ("int4_g64_t8", 4608),
    ("int4_g64_t16", 4608),
    ("int4_g32_t8", 5120),
    ("int4_g32_t16", 5120),
];

/// Instructions that a warp has for its loop, where a multiprocessor gets `record_bytes` at its
/// share of an H200's copies, 4.3 TB/s among 132 at 1.7 GHz, and four schedulers issue one a clock.
fn slots_of_a_warp(record_bytes: u32) -> u32 {
    let bytes_a_clock = 4.3e12 / 132.0 / 1.7e9;
    (4.0 * f64::from(record_bytes) / bytes_a_clock * 4.0 / 8.0) as u32
}

/// What is known about one kernel on one target.
#[derive(Debug, Default, PartialEq, Eq)]
struct Compiled {
    registers: u32,
    stack_bytes: u32,
    spill_bytes: u32,
    opcodes: BTreeSet<String>,
    /// Instructions of the shortest loop with tensor-core products in it.
    product_loop: Option<u32>,
    /// What was seen before the last wait for the launches before.
    before_wait: BTreeSet<String>,
    /// Address of each instruction so far, and whether it is such a product.
    seen: Vec<(u64, bool)>,
}

impl Compiled {
    /// Takes note of an instruction: of its opcode, and of the loop that it ends.
    fn read(&mut self, address: u64, instruction: &str) {
        let mut words = instruction.split_whitespace();
        // A predicate may come first.
        let word = words.find(|word| !word.starts_with('@')).unwrap_or_default();
        let opcode: String = word.chars().take_while(char::is_ascii_alphanumeric).collect();
        self.seen.push((address, opcode == "HMMA"));
        let to = instruction.split("0x").nth(1).filter(|_| opcode == "BRA");
        let to = to.and_then(|digits| {
            let end = digits.find(|c: char| !c.is_ascii_hexdigit()).unwrap_or(digits.len());
            u64::from_str_radix(&digits[..end], 16).ok()
        });
        let body = self.seen.iter().filter(|(at, _)| to.is_some_and(|to| *at >= to));
        let (len, products) = body.fold((0, false), |(len, any), (_, hmma)| (len + 1, any | hmma));
        if products {
            self.product_loop = Some(self.product_loop.map_or(len, |shortest| shortest.min(len)));
        }
        if opcode == "ACQBULK" {
            self.before_wait.clone_from(&self.opcodes);
        }
        self.opcodes.insert(opcode);
    }
}

fn root() -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).ancestors().nth(2).expect("two folders up").into()
}

fn succeed(command: &mut Command) -> String {
    let done = command.output().unwrap_or_else(|e| panic!("{command:?} does not start: {e}"));
    let text = String::from_utf8_lossy(&done.stdout) + String::from_utf8_lossy(&done.stderr);
    assert!(done.status.success(), "{command:?} failed\n{text}");
    text.into_owned()
}

/// Numbers before the words that name them, e.g. `8 bytes spill stores`.
fn number(line: &str, words: &str) -> u32 {
    let before = line.split(words).next().filter(|_| line.contains(words));
    let digits = before.and_then(|text| text.split_whitespace().next_back());
    digits.and_then(|digits| digits.parse().ok()).unwrap_or(0)
}

/// Reads `ptxas -v`: registers, stack and spills of each kernel.
fn read_usage(text: &str, found: &mut BTreeMap<String, Compiled>) {
    let mut kernel = None;
    for line in text.lines() {
        if let Some(rest) = line.split("Compiling entry function '").nth(1) {
            let name = rest.split('\'').next().expect("a name").to_owned();
            kernel = Some(found.entry(name).or_default());
        }
        let Some(kernel) = &mut kernel else { continue };
        let spilled = number(line, " bytes spill stores") + number(line, " bytes spill loads");
        kernel.spill_bytes += spilled;
        kernel.stack_bytes += number(line, " bytes stack frame");
        kernel.registers += number(line, " registers, ");
    }
}

/// Reads a disassembly: the opcodes of each kernel, without what follows the first dot, and loops.
fn read_opcodes(text: &str, found: &mut BTreeMap<String, Compiled>) {
    let mut kernel = None;
    for line in text.lines().map(str::trim) {
        if let Some(name) = line.strip_prefix("Function : ") {
            kernel = Some(found.entry(name.to_owned()).or_default());
        }
        let parts = line.strip_prefix("/*").and_then(|rest| rest.split_once("*/"));
        let Some((kernel, (address, instruction))) = kernel.as_mut().zip(parts) else { continue };
        // Words of the encoding that stand alone are no addresses.
        let Ok(address) = u64::from_str_radix(address, 16) else { continue };
        kernel.read(address, instruction);
    }
}

/// Compiles all kernels for one target.
fn compile(nvcc: &Path, (arch, target): (&str, &str)) -> BTreeMap<String, Compiled> {
    let cuda = root().join("kernels/cuda/cu");
    let folder = Path::new(env!("CARGO_TARGET_TMPDIR"));
    let (source, cubin) =
        (folder.join(format!("{target}.cu")), folder.join(format!("{target}.cubin")));
    let text = toolchain::together(&cuda).expect("kernels");
    fs::write(&source, text).expect("a writable folder");
    let mut command = Command::new(nvcc);
    command.args(toolchain::FLAGS).args(toolchain::include(&cuda));
    command.arg(format!("-gencode=arch={arch},code={target}")).args(["-Xptxas", "-v", "-cubin"]);
    let text = succeed(command.arg("-o").arg(&cubin).arg(&source));
    assert!(!text.contains("warning") && !text.contains("serialized"), "{target}: {text}");
    let mut found = BTreeMap::new();
    read_usage(&text, &mut found);
    let disassembler = nvcc.with_file_name("cuobjdump");
    assert!(
        disassembler.is_file(),
        "no cuobjdump beside {}: {}",
        nvcc.display(),
        toolchain::REMEDY
    );
    let path = nvcc.parent().expect("a folder");
    let text = succeed(Command::new(&disassembler).env("PATH", path).arg("-sass").arg(&cubin));
    read_opcodes(&text, &mut found);
    found
}

/// What is wrong with a kernel.
fn faults(name: &str, target: &str, compiled: &Compiled) -> Vec<String> {
    let mut faults = Vec::new();
    let Compiled { registers, stack_bytes, spill_bytes, opcodes, product_loop, .. } = compiled;
    if stack_bytes + spill_bytes > 0 {
        let found = format!("{spill_bytes} bytes spilled, {stack_bytes} bytes of stack");
        faults.push(format!("{name} for {target}: {found}"));
    }
    if opcodes.contains("USETMAXREG") && *registers != REGISTERS_OF_384 {
        let counted = format!("{registers} registers at first, not {REGISTERS_OF_384}");
        faults.push(format!("{name} for {target}: {counted}"));
    }
    let of_records = OF_RECORDS.iter().find_map(|start| name.strip_prefix(start));
    if of_records.is_some() && *registers > REGISTERS_OF_288 {
        let counted = format!("{registers} registers, {REGISTERS_OF_288} at most");
        faults.push(format!("{name} for {target}: {counted}"));
    }
    for (_, record_bytes) in KEEPS_UP.iter().filter(|(kernel, _)| of_records == Some(*kernel)) {
        let slots = slots_of_a_warp(*record_bytes);
        if target == "sm_90a" && product_loop.is_none_or(|len| len > slots) {
            faults
                .push(format!("{name} for {target}: a loop of {product_loop:?}, {slots} at most"));
        }
    }
    let fits = |start: &str| name.starts_with(start);
    for (_, opcode) in AHEAD.iter().filter(|(start, _)| target == "sm_90a" && fits(start)) {
        if !compiled.before_wait.contains(*opcode) {
            faults.push(format!("{name} for {target}: no {opcode} before it waits for others"));
        }
    }
    let longest = MEANT.iter().filter(|(start, ..)| fits(start)).map(|(start, ..)| start.len());
    let longest = longest.max().unwrap_or(0);
    let meant = MEANT
        .iter()
        .filter(|(start, on, _)| fits(start) && start.len() == longest && on.contains(&target));
    for opcode in meant.flat_map(|(.., opcodes)| *opcodes) {
        if !opcodes.contains(*opcode) {
            faults.push(format!("{name} for {target}: no {opcode} in its machine code"));
        }
    }
    faults
}

#[test]
fn every_kernel_compiles_for_every_target_without_spills_and_as_meant() {
    let nvcc = toolchain::nvcc(&root()).unwrap_or_else(|remedy| panic!("{remedy}"));
    let for_target = |target: (&'static str, &'static str)| -> Vec<String> {
        let found = compile(&nvcc, target);
        assert!(found.contains_key("add_bf16"), "no kernels for {}", target.1);
        let wrong = found.iter().map(|(name, compiled)| faults(name, target.1, compiled));
        wrong.flatten().collect()
    };
    let wrong: Vec<String> = thread::scope(|scope| {
        let started = toolchain::TARGETS.map(|target| scope.spawn(move || for_target(target)));
        started.into_iter().flat_map(|thread| thread.join().expect("no panic")).collect()
    });
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}

#[test]
fn spills_and_missing_instructions_are_faults() {
    let mut found = BTreeMap::new();
    let usage = "ptxas info    : Compiling entry function 'attention_decode_x' for 'sm_80'\n\
                 ptxas info    : Function properties for attention_decode_x\n    \
                 16 bytes stack frame, 8 bytes spill stores, 12 bytes spill loads\n\
                 ptxas info    : Used 255 registers, used 1 barriers, 380 bytes cmem[0]\n";
    read_usage(usage, &mut found);
    let assembly = "\t\tFunction : attention_decode_x\n\
                    /*0000*/  @!P0 HMMA.16816.F32.BF16 R4, R4, R8, R4 ;  /* 0x1 */\n\
                    /* 0x2 */\n\
                    /*0010*/  LDGSTS.E.BYPASS.128 [R1], [R2.64] ;  /* 0x3 */\n";
    read_opcodes(assembly, &mut found);
    let compiled = &found["attention_decode_x"];
    assert_eq!((compiled.stack_bytes, compiled.spill_bytes, compiled.registers), (16, 20, 255));
    let wrong = faults("attention_decode_x", "sm_80", compiled);
    assert_eq!(wrong.len(), 2, "{wrong:?}");
    assert!(wrong[0].contains("20 bytes spilled") && wrong[1].contains("no LDSM"), "{wrong:?}");
}

#[test]
fn a_loop_that_memory_outruns_is_a_fault() {
    let mut found = BTreeMap::new();
    let assembly = "\t\tFunction : skinny_linear_int4_g128_t8\n\
                    /*0000*/  HMMA.16816.F32.BF16 R4, R4, R8, R4 ;  /* 0x1 */\n\
                    /*0010*/  LDS.128 R1, [R2] ;  /* 0x1 */\n\
                    /*0020*/  @P0 BRA 0x10 ;  /* 0x1 */\n\
                    /*0030*/  @P1 BRA.U.ANY 0x0 ;  /* 0x1 */\n\
                    /*0040*/  @P1 BRA 0x80 ;  /* 0x1 */\n\
                    /*0080*/  HMMA.16816.F32.BF16 R4, R4, R8, R4 ;  /* 0x1 */\n";
    read_opcodes(assembly, &mut found);
    let kernel = found.get_mut("skinny_linear_int4_g128_t8").expect("it was read");
    // Neither the loop without a product nor what a jump ahead leaves out.
    assert_eq!(kernel.product_loop, Some(4));
    assert_eq!(slots_of_a_warp(4352), 454);
    kernel.product_loop = Some(455);
    kernel.registers = 176;
    let wrong = faults("skinny_linear_int4_g128_t8", "sm_90a", kernel);
    assert!(wrong.iter().any(|fault| fault.contains("a loop of Some(455)")), "{wrong:?}");
    assert!(wrong.iter().any(|fault| fault.contains("176 registers, 168")), "{wrong:?}");
    assert!(wrong.iter().any(|fault| fault.contains("no UBLKCP in")), "{wrong:?}");
    assert!(wrong.iter().any(|fault| fault.contains("no UBLKCP before it waits")), "{wrong:?}");
    let older = faults("skinny_linear_int4_g128_t8", "sm_80", kernel);
    assert!(!older.iter().any(|fault| fault.contains("UBLKCP")), "{older:?}");
}

#[test]
fn hopper_kernels_are_held_to_hopper_alone() {
    let nothing = Compiled::default();
    assert!(faults("attention_prefill_sm90_d128_bf16", "sm_80", &nothing).is_empty());
    assert_eq!(faults("attention_prefill_sm90_d128_bf16", "sm_90a", &nothing).len(), 6);
    assert_eq!(faults("attention_prefill_sm90_d128_fp8", "sm_90a", &nothing).len(), 7);
    assert_eq!(faults("attention_prefill_d128", "sm_90a", &nothing).len(), 3);
    assert!(faults("add_bf16", "sm_90a", &nothing).is_empty());
    let opcodes = WGMMA.map(str::to_owned).into();
    let scarce = Compiled { registers: 160, opcodes, ..Compiled::default() };
    let wrong = faults("attention_prefill_sm90_d128_bf16", "sm_90a", &scarce);
    assert!(wrong.len() == 1 && wrong[0].contains("160 registers"), "{wrong:?}");
}

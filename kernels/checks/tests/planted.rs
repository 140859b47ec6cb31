//! Faults planted in copies of the kernels are found: else a check that passes says nothing.

use checks::Check;
use cuda::Cuda;
use emulate::{
    Emulator, Schedule,
    compile::{self, Places, Variant},
};
use std::{
    env, fs,
    path::{Path, PathBuf},
    process::Command,
};

/// Names the library that a process under AddressSanitizer runs.
const UNDER_ASAN: &str = "LOCKSTEP_CHECKS_PLANTED";

/// Compiles kernel file `name`, and `step`, with `fault.0` of `file` replaced by `fault.1`.
fn planted(
    name: &str,
    file: &str,
    fault: (&str, &str),
    variant: Variant,
) -> (PathBuf, tempfile::TempDir) {
    planted_in(&[name], file, fault, variant)
}

/// As `planted`, of several kernel files.
fn planted_in(
    names: &[&str],
    file: &str,
    fault: (&str, &str),
    variant: Variant,
) -> (PathBuf, tempfile::TempDir) {
    let here = Path::new(env!("CARGO_MANIFEST_DIR")).parent().expect("kernels/");
    let dir = tempfile::tempdir().expect("a folder");
    let copy = dir.path().join("cuda");
    fs::create_dir(&copy).expect("a folder");
    for entry in fs::read_dir(here.join("cuda/cu")).expect("kernels/cuda/cu") {
        let path = entry.expect("an entry").path();
        fs::copy(&path, copy.join(path.file_name().expect("a name"))).expect("a copy");
    }
    let damaged = copy.join(file);
    let text = fs::read_to_string(&damaged).expect("a kernel file");
    assert!(text.contains(fault.0), "{file} has no {:?} to damage", fault.0);
    fs::write(&damaged, text.replace(fault.0, fault.1)).expect("a writable copy");
    let places = Places { kernels: &copy, out: dir.path() };
    // Attention follows indices that `step` makes.
    let wanted = |found: &str| found == "step" || names.contains(&found);
    let library = compile::compile(&places, variant, &wanted);
    (library.expect("the damaged kernels compile"), dir)
}

/// What the checks say of a library.
fn verdict(library: &Path, checks: &[Check<Emulator>]) -> Result<(), String> {
    let device = |config| {
        let emulator = Emulator::load(library, Schedule::InTurn).expect("the library loads");
        Cuda::new(emulator, config)
    };
    checks.iter().try_for_each(|check| (check.run)(&device))
}

#[test]
fn a_missing_barrier_is_a_race() {
    let barrier = ("        __syncthreads();\n        x = 0.0f;", "        x = 0.0f;");
    let (library, _dir) = planted("norm", "common.cuh", barrier, compile::RACES);
    let error = verdict(&library, &checks::norm::checks()).expect_err("a race");
    assert!(error.contains("race on byte"), "{error}");
}

#[test]
fn a_missing_barrier_gives_wrong_numbers_too() {
    let barrier = ("        __syncthreads();\n        x = 0.0f;", "        x = 0.0f;");
    let (library, _dir) = planted("norm", "common.cuh", barrier, compile::PLAIN);
    verdict(&library, &checks::norm::checks()).expect_err("wrong numbers");
}

#[test]
fn an_index_past_the_end_is_an_address_fault() {
    const NAME: &str = "an_index_past_the_end_is_an_address_fault";
    if let Some(library) = env::var_os(UNDER_ASAN) {
        let verdict = verdict(Path::new(&library), &checks::elementwise::checks());
        panic!("the process was to end before: {verdict:?}");
    }
    let index = ("if (at >= args.vectors) break;", "if (at > args.vectors) break;");
    let (library, _dir) = planted("elementwise", "elementwise.cu", index, compile::ASAN);
    let done = Command::new(env::current_exe().expect("the test's own path"))
        .args(["--exact", NAME, "--nocapture"])
        .env(UNDER_ASAN, library)
        .env("LD_PRELOAD", emulate::libasan())
        .env("ASAN_OPTIONS", "detect_leaks=0:detect_stack_use_after_return=0")
        .output()
        .expect("the test runs again");
    let text = String::from_utf8_lossy(&done.stderr);
    assert!(!done.status.success() && text.contains("heap-buffer-overflow"), "{text}");
}

const KERNEL: &str = "attention_prefill_sm90.cu";

/// What the checks of the wgmma kernel say where `fault.0` of `file` is replaced by `fault.1`.
fn wgmma_planted(file: &str, fault: (&str, &str)) -> String {
    let (library, _dir) = planted("attention_prefill_sm90", file, fault, compile::PLAIN);
    verdict(&library, &checks::prefill_sm90::checks()).expect_err("an error")
}

#[test]
fn a_thread_that_ends_before_its_copies_is_an_error() {
    let wait = ("barrier_wait(&shared.value_ring.full[last.slot], last.parity);", "");
    let error = wgmma_planted("prefill_sm90.cuh", wait);
    assert!(error.contains("ends before its copies have landed"), "{error}");
}

#[test]
fn a_call_that_nobody_hears_is_an_error() {
    let error = wgmma_planted(KERNEL, ("group == 1 && steps.count > 1", "group == 1"));
    assert!(error.contains("at which nobody waited"), "{error}");
}

#[test]
fn registers_that_nobody_gave_back_are_waited_for() {
    let error = wgmma_planted(KERNEL, ("registers_shrink<COPY_REGISTERS>();", ""));
    assert!(error.contains("waits in setmaxnreg"), "{error}");
}

#[test]
fn a_product_of_what_was_copied_wants_a_proxy_fence() {
    let fence = ("if (format == KvFormat::BF16) fence_async_proxy();", "");
    let error = wgmma_planted(KERNEL, fence);
    assert!(error.contains("no fence.proxy.async between"), "{error}");
}

/// What the checks of the wgmma kernel with caches in e4m3 say where `fault.0` of what widens is
/// replaced by `fault.1`.
fn widening_planted(fault: (&str, &str), variant: Variant) -> String {
    let (library, _dir) = planted("attention_prefill_sm90", "prefill_sm90_fp8.cuh", fault, variant);
    let mut checks = checks::prefill_sm90::checks();
    checks.retain(|check| check.name.contains("e4m3"));
    verdict(&library, &checks).expect_err("an error")
}

#[test]
fn a_product_of_what_was_widened_wants_a_proxy_fence() {
    let error = widening_planted(("        fence_async_proxy();\n", ""), compile::PLAIN);
    assert!(error.contains("no fence.proxy.async between"), "{error}");
}

#[test]
fn codes_that_are_not_scaled_are_found() {
    let unscaled = ("pack_bf16(x[2] * scale, x[3] * scale)", "pack_bf16(x[2], x[3])");
    let error = widening_planted(unscaled, compile::PLAIN);
    assert!(error.contains("wanted"), "{error}");
}

#[test]
fn scales_of_slots_that_no_token_has_are_found() {
    let error = widening_planted(("        clear_scales(stage, i);\n", ""), compile::PLAIN);
    assert!(error.contains("NaN"), "{error}");
}

#[test]
fn a_slot_that_is_waited_for_in_the_wrong_phase_is_an_error() {
    let free = "barrier_wait(&ring.free[place.slot], place.parity ^ 1);";
    let other = free.replace("parity ^ 1", "parity");
    let error = widening_planted((free, &other), compile::PLAIN);
    assert!(error.contains("deadlock") && error.contains("an mbarrier"), "{error}");
}

#[test]
fn scales_that_another_lane_has_copied_are_waited_for() {
    let wait =
        ("cp_async_wait<STAGES - 2>();\n        __syncwarp();", "cp_async_wait<STAGES - 2>();");
    let error = widening_planted(wait, compile::RACES);
    assert!(error.contains("race on byte"), "{error}");
}

/// What the checks of tiles that are cut along their keys say where `fault.0` of `file` is replaced
/// by `fault.1`.
fn spans_planted(file: &str, fault: (&str, &str)) {
    let files = ["attention_prefill", "attention_combine"];
    let (library, _dir) = planted_in(&files, file, fault, compile::PLAIN);
    let mut checks = checks::prefill::checks();
    checks.retain(|check| check.name == "prefill: spans of keys");
    assert_eq!(checks.len(), 1);
    let error = verdict(&library, &checks).expect_err("an error");
    assert!(error.contains("wanted"), "{error}");
}

#[test]
fn a_span_that_goes_on_into_the_next_is_found() {
    let end = "tile.keys_stop = min(tile.keys_end, (span + 1) * keys);";
    spans_planted("prefill.cuh", (end, "tile.keys_stop = tile.keys_end;"));
}

#[test]
fn a_span_that_nobody_adds_is_found() {
    let all = "#pragma unroll 8\n    for (int s = spans.first; s <= spans.last; ++s)";
    spans_planted("attention_combine.cu", (all, &all.replace("<=", "<")));
}

#[test]
fn sums_that_are_added_as_they_lie_are_found() {
    let share = "const float share = exp2_approx(weight(s)[0] - most);";
    spans_planted("attention_combine.cu", (share, "const float share = 1.0f;"));
}

#[test]
fn sums_of_another_row_are_found() {
    let place = "tile.place = place + span * tile.rows;";
    spans_planted("prefill.cuh", (place, "tile.place = place + span * (tile.rows - 1);"));
}

/// What the checks of products with weights of bf16 in records say, on a device of one
/// multiprocessor, whose ring comes round, where `fault.0` of `file` is replaced by `fault.1`.
fn records_planted(file: &str, fault: (&str, &str), variant: Variant) -> String {
    let files = &["skinny_bf16", "skinny_pack"];
    let (library, _dir) = planted_in(files, file, fault, variant);
    let device = |config| {
        let emulator = Emulator::load(&library, Schedule::InTurn).expect("the library loads");
        Cuda::new(emulator.of_multiprocessors(1), config)
    };
    let of_bf16 = |check: &Check<Emulator>| check.name.ends_with("of bf16");
    let checks = checks::skinny::checks().into_iter().filter(of_bf16);
    let verdict = checks.map(|check| (check.run)(&device)).collect::<Result<Vec<()>, String>>();
    verdict.expect_err("an error")
}

const LINEAR: &str = "skinny_linear.cuh";
const FULL: &str = "            barrier_wait(&ring.full[place.stage], place.parity);\n";

#[test]
fn a_record_that_nobody_waited_for_is_a_race() {
    let error = records_planted(LINEAR, (FULL, ""), compile::RACES);
    assert!(error.contains("race on byte"), "{error}");
}

#[test]
fn a_record_that_nobody_waited_for_never_lands() {
    let error = records_planted(LINEAR, (FULL, ""), compile::PLAIN);
    assert!(error.contains("bulk copies have landed"), "{error}");
}

#[test]
fn waiting_for_the_wrong_phase_is_a_race() {
    let other = FULL.replace("place.parity", "place.parity ^ 1");
    let error = records_planted(LINEAR, (FULL, &other), compile::RACES);
    assert!(error.contains("race on byte"), "{error}");
}

#[test]
fn a_stage_that_is_filled_before_it_is_read_is_an_error() {
    let empty =
        ("            barrier_wait(&ring.empty[step.place.stage], step.place.parity ^ 1);\n", "");
    let error = records_planted(LINEAR, empty, compile::PLAIN);
    assert!(error.contains("copies have landed"), "{error}");
}

const EXPECTED: &str = "barrier_arrive_expect(full, unit.strips * Format::BYTES);";

#[test]
fn bytes_that_nobody_expects_are_an_error() {
    let fewer = EXPECTED.replace("unit.strips *", "(unit.strips - 1) *");
    let error = records_planted(LINEAR, (EXPECTED, &fewer), compile::PLAIN);
    assert!(error.contains("a bulk copy of"), "{error}");
}

#[test]
fn bytes_that_never_come_are_waited_for() {
    let more = EXPECTED.replace("unit.strips *", "(unit.strips + 1) *");
    let error = records_planted(LINEAR, (EXPECTED, &more), compile::PLAIN);
    assert!(error.contains("deadlock") && error.contains("an mbarrier"), "{error}");
}

#[test]
fn sums_that_are_added_before_the_last_has_arrived_are_wrong() {
    let early = ("atomicAdd(arrived, 1u) == parts - 1", "atomicAdd(arrived, 1u) == parts - 2");
    let error = records_planted("skinny_sums.cuh", early, compile::PLAIN);
    assert!(error.contains("wanted"), "{error}");
}

/// What the checks of gates and ups in the epilogue of their product say, with weights of bf16 and
/// of e4m3.
fn gated_planted(file: &str, fault: (&str, &str)) -> String {
    let files = ["skinny_bf16", "skinny_e4m3", "skinny_pack", "elementwise", "fp8"];
    let (library, _dir) = planted_in(&files, file, fault, compile::PLAIN);
    let checks: Vec<_> = checks::gated::checks().into_iter().take(2).collect();
    assert_eq!(checks.iter().map(|c| c.name).collect::<Vec<_>>(), ["gated: bf16", "gated: e4m3"]);
    verdict(&library, &checks).expect_err("an error")
}

const SUMS: &str = "skinny_sums.cuh";
const GATED: &str = "silu_mul(pack_bf16(x[0], x[2]), pack_bf16(x[1], x[3]))";

#[test]
fn gate_and_up_in_each_others_place_are_found() {
    let swapped = "silu_mul(pack_bf16(x[1], x[3]), pack_bf16(x[0], x[2]))";
    let error = gated_planted(SUMS, (GATED, swapped));
    assert!(error.contains("apart"), "{error}");
}

#[test]
fn sums_that_are_not_rounded_before_silu_are_found() {
    let exact = "pack_bf16(silu(x[0]) * x[1], silu(x[2]) * x[3])";
    let error = gated_planted(SUMS, (GATED, exact));
    assert!(error.contains("apart"), "{error}");
}

#[test]
fn the_scale_of_another_row_is_found() {
    let other = ("load8(scales_at(args.pairs + i))", "load8(scales_at(i))");
    let error = gated_planted(SUMS, other);
    assert!(error.contains("apart"), "{error}");
}

#[test]
fn rows_that_are_unpacked_as_they_lie_are_found() {
    let lie = ("row_of_matrix(spot.row + 2 * m + r, args.pairs)", "spot.row + 2 * m + r");
    let error = gated_planted("skinny_pack.cu", lie);
    assert!(error.contains("193 ×") && error.contains("apart"), "{error}");
}

const EXPERTS: &str = "skinny_experts.cuh";

/// What the check `name` of products by expert says.
fn experts_planted(name: &str, file: &str, fault: (&str, &str)) -> String {
    let files = [
        "skinny_experts_bf16",
        "skinny_experts_e4m3",
        "skinny_pack",
        "experts",
        "elementwise",
        "fp8",
    ];
    let (library, _dir) = planted_in(&files, file, fault, compile::PLAIN);
    let mut checks = checks::experts::checks();
    checks.retain(|check| check.name == name);
    assert_eq!(checks.len(), 1, "{name}");
    verdict(&library, &checks).expect_err("an error")
}

#[test]
fn places_that_a_second_walk_leaves_out_are_found() {
    let again = ("unit.place = start + first;", "unit.place = start;");
    let error = experts_planted("experts: bf16", EXPERTS, again);
    assert!(error.contains("70 tokens") && error.contains("is NaN"), "{error}");
}

#[test]
fn rows_of_another_experts_places_are_found() {
    let first = ("place = unit.place + token;", "place = token;");
    let error = experts_planted("experts: bf16", EXPERTS, first);
    assert!(error.contains("wanted"), "{error}");
}

#[test]
fn the_scales_of_another_expert_are_found() {
    let first = ("static_cast<uint64_t>(unit.weight) * args.rows + row", "row");
    let error = experts_planted("experts: e4m3", SUMS, first);
    assert!(error.contains("wanted"), "{error}");
}

#[test]
fn experts_that_are_read_before_they_are_chosen_are_found() {
    let wait =
        ("wait_prerequisites();\n        if (threadIdx.x >= WARP)", "if (threadIdx.x >= WARP)");
    let error = experts_planted("experts: overlapping kernels", EXPERTS, wait);
    assert!(error.contains("a block that never waits for the launches before"), "{error}");
}

/// What the checks of exchanges say where `fault.0` of `file` is replaced by `fault.1`.
fn peers_planted(file: &str, fault: (&str, &str)) -> String {
    let (library, _dir) = planted("peers", file, fault, compile::PLAIN);
    verdict(&library, &checks::peers::checks()).expect_err("an error")
}

#[test]
fn a_rank_that_does_not_wait_for_the_others_sums_what_is_not_there_yet() {
    let wait = ("const bool came = !waits || wait(", "const bool came = true || wait(");
    peers_planted("peers.cuh", wait);
}

#[test]
fn calls_that_share_an_area_overwrite_what_is_still_read() {
    let parity = ("PEER_AREAS + number % 2 * regions.area_bytes", "PEER_AREAS");
    peers_planted("peers.cuh", parity);
}

#[test]
fn calls_that_share_flags_miss_some() {
    let parity = ("number % 2 * 2 + phase", "phase");
    peers_planted("peers.cuh", parity);
}

#[test]
fn a_wait_without_a_limit_is_not_one() {
    // It ends, but only after a second a wait, of which the check makes hundreds.
    let forgotten = ("if (!all) control()->failed = 1;", "");
    peers_planted("peers.cuh", forgotten);
}

/// What the checks of laying out a step and of decoding say where a line of `step.cu` or
/// `attention_decode.cu` is damaged.
fn step_planted(file: &str, fault: (&str, &str)) -> String {
    let (library, _dir) = planted("attention_decode", file, fault, compile::PLAIN);
    let checks = [checks::laid_out::checks(), checks::decode::checks()].into_iter().flatten();
    verdict(&library, &checks.collect::<Vec<_>>()).expect_err("an error")
}

#[test]
fn a_table_that_new_blocks_do_not_reach_is_found() {
    let told =
        ("args.block_tables[args.new_blocks[2 * item]] = args.new_blocks[2 * item + 1];", "");
    let error = step_planted("step.cu", told);
    assert!(error.contains("slots [") || error.contains("block tables ["), "{error}");
}

#[test]
fn a_slot_of_the_step_before_is_found() {
    let error = step_planted("step.cu", ("args.slots[row] = -1;", ""));
    assert!(error.contains("slots of padding"), "{error}");
}

#[test]
fn a_sum_that_nobody_waits_for_is_found() {
    let early = ("atomicAdd(arrived, 1u) == due;", "atomicAdd(arrived, 1u) + 1 == due;");
    step_planted("attention_decode.cu", early);
}

#[test]
fn a_counter_that_is_left_as_it_was_is_found() {
    step_planted("attention_decode.cu", ("if (all->last) *arrived = 0;", ""));
}

/// What the checks of kernels that overlap say where `fault.0` of `file` is replaced by `fault.1`.
fn overlap_planted(file: &str, fault: (&str, &str)) -> String {
    let files = ["skinny_bf16", "skinny_pack", "norm", "attention_decode", "random"];
    let (library, _dir) = planted_in(&files, file, fault, compile::PLAIN);
    let checks: Vec<_> = checks::chained::checks().into_iter().take(1).collect();
    assert_eq!(checks[0].name, "overlapping kernels: bf16");
    verdict(&library, &checks).expect_err("an error")
}

#[test]
fn a_kernel_that_does_not_wait_for_the_one_before_it_is_found() {
    let fault = (
        "by_warp(const NormArgs& args) {\n    follow_launches();",
        "by_warp(const NormArgs& args) {",
    );
    let error = overlap_planted("norm.cu", fault);
    assert!(error.contains("a block that never waits for the launches before"), "{error}");
}

#[test]
fn tokens_that_are_read_before_their_kernel_is_done_are_found() {
    let wait =
        ("        wait_prerequisites();\n    }\n    return came;", "    }\n    return came;");
    let error = overlap_planted(LINEAR, wait);
    assert!(error.contains("not as one by one"), "{error}");
}

#[test]
fn a_row_that_is_turned_before_its_product_is_done_is_found() {
    let wait = ("makes the row.\n    wait_prerequisites();", "makes the row.");
    let error = overlap_planted("decode_row.cuh", wait);
    assert!(error.contains("not as one by one"), "{error}");
}

/// What the checks of rows that decode attention turns say.
fn turned_planted(file: &str, fault: (&str, &str)) -> String {
    let files = ["attention_decode", "rope"];
    let (library, _dir) = planted_in(&files, file, fault, compile::PLAIN);
    verdict(&library, &checks::turned::checks()).expect_err("an error")
}

#[test]
fn a_new_value_that_attention_does_not_see_is_found() {
    let unseen = ("if (has_new) own.put(keys + Shape::BYTES, 1,", "if (false) own.put(keys, 1,");
    let error = turned_planted("attention_decode.cu", unseen);
    assert!(error.contains("of the result has other bits"), "{error}");
}

#[test]
fn a_new_key_that_nobody_stores_is_found() {
    let nobody = ("split.first_head == split.kv_head * args.group", "split.first_head < 0");
    let error = turned_planted("decode_row.cuh", nobody);
    assert!(error.contains("of the cached keys is another"), "{error}");
}

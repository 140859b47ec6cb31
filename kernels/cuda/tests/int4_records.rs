//! What the device makes of integers of 4 bits is what the layout of `cu/skinny.cuh` says, to the
//! last byte.

use cuda::{Cuda, CudaConfig, Driver, Facts, Gemm, Launch};
use emulate::{Emulator, PLAIN, Schedule, library};
use half::f16;
use kernels::{Backend, Grouped, Groups, KernelError, Stored, WeightPart};
use std::{
    ops::Range,
    sync::{Arc, Mutex},
};

/// Rows and columns of a record, and columns of a lane's bytes.
const STRIP: usize = 64;
const STAGE_COLS: usize = 128;
const SLOT_COLS: usize = 32;

/// A device whose weights can be read.
struct Spy {
    device: Emulator,
    weights: Mutex<Vec<(Memory, usize)>>,
}

type Memory = Arc<<Emulator as Driver>::Memory>;

impl Driver for Spy {
    type Memory = Memory;
    type Graph = <Emulator as Driver>::Graph;
    type Reading = <Emulator as Driver>::Reading;

    fn facts(&self) -> &Facts {
        self.device.facts()
    }

    fn zeroed(&self, what: &'static str, bytes: usize) -> Result<Memory, KernelError> {
        let memory = Arc::new(self.device.zeroed(what, bytes)?);
        if what == "a weight" {
            self.weights.lock().expect("alone").push((Arc::clone(&memory), bytes));
        }
        Ok(memory)
    }

    fn shared(&self, what: &'static str, bytes: usize) -> Result<Memory, KernelError> {
        self.device.shared(what, bytes).map(Arc::new)
    }

    fn export(&self, memory: &Memory) -> Result<Vec<u8>, KernelError> {
        self.device.export(memory)
    }

    fn import(&self, ticket: &[u8]) -> Result<Memory, KernelError> {
        self.device.import(ticket).map(Arc::new)
    }

    fn address(&self, memory: &Memory) -> u64 {
        self.device.address(memory)
    }

    fn write(&self, to: &Memory, offset: usize, bytes: &[u8]) -> Result<(), KernelError> {
        self.device.write(to, offset, bytes)
    }

    fn read(&self, to: &mut [u8], from: &Memory, offset: usize) -> Result<(), KernelError> {
        self.device.read(to, from, offset)
    }

    fn begin_read(
        &self,
        from: &Memory,
        offset: usize,
        bytes: usize,
    ) -> Result<Self::Reading, KernelError> {
        self.device.begin_read(from, offset, bytes)
    }

    fn end_read(&self, reading: Self::Reading) -> Result<Vec<u8>, KernelError> {
        self.device.end_read(reading)
    }

    fn launch(&self, launch: Launch<'_>) -> Result<(), KernelError> {
        self.device.launch(launch)
    }

    fn gemm(&self, gemm: Gemm) -> Result<(), KernelError> {
        self.device.gemm(gemm)
    }

    fn captures(&self) -> bool {
        self.device.captures()
    }

    fn begin_capture(&self) -> Result<(), KernelError> {
        self.device.begin_capture()
    }

    fn end_capture(&self) -> Result<Self::Graph, KernelError> {
        self.device.end_capture()
    }

    fn replay(&self, graph: &Self::Graph) -> Result<(), KernelError> {
        self.device.replay(graph)
    }
}

/// Matrices of one stack.
struct Stack {
    /// Of each.
    rows: Vec<usize>,
    cols: usize,
    groups: Groups,
    /// Rows are gates, then as many ups, and lie in turn.
    in_turn: bool,
}

fn stack<const N: usize>(rows: [usize; N], cols: usize, groups: Groups) -> Stack {
    Stack { rows: rows.into(), cols, groups, in_turn: false }
}

fn runs(size: usize, first: usize) -> Groups {
    Groups::Runs { size, first }
}

/// Numbers that repeat nowhere near.
fn mixed(seed: usize, row: usize, at: usize) -> usize {
    ((seed * 7919 + row * 613 + at * 104_729) * 2_654_435_761 % (1 << 32)) >> 13
}

fn quant(part: usize, row: usize, col: usize) -> u8 {
    (mixed(part, row, col) % 16) as u8
}

fn zero(part: usize, row: usize, group: usize) -> u16 {
    (mixed(part + 50, row, group) % 17) as u16
}

fn scale(part: usize, row: usize, group: usize) -> f16 {
    f16::from_bits((mixed(part + 90, row, group) % 0x7c00) as u16)
}

impl Stack {
    /// G.
    fn count(&self) -> usize {
        (0..self.cols).map(|k| self.groups.of(k)).max().expect("columns") + 1
    }

    fn parts(&self) -> Vec<WeightPart<'static>> {
        let part = |(part, &rows): (usize, &usize)| {
            let (cols, count) = (self.cols, self.count());
            let each =
                |count: usize| (0..rows).flat_map(move |n| (0..count).map(move |at| (n, at)));
            let values: Vec<u8> = each(cols).map(|(n, k)| quant(part, n, k)).collect();
            let grouped = Grouped {
                bits: 4,
                values: Grouped::packed(4, cols, &values).into(),
                groups: self.groups.clone(),
                scales: each(count).map(|(n, group)| scale(part, n, group)).collect(),
                zeros: each(count).map(|(n, group)| zero(part, n, group)).collect(),
            };
            WeightPart { rows, cols, stored: Stored::Grouped(grouped) }
        };
        self.rows.iter().enumerate().map(part).collect()
    }

    /// The part of what lies at `row`, and which of its rows that is.
    fn part_of(&self, row: usize) -> Option<(usize, usize)> {
        if self.in_turn {
            return (row / 2 < self.rows[row % 2]).then_some((row % 2, row / 2));
        }
        let mut row = row;
        for (part, rows) in self.rows.iter().enumerate() {
            if row < *rows {
                return Some((part, row));
            }
            row -= rows;
        }
        None
    }

    /// The column at each place, runs of `unit` being of one group.
    fn places(&self, unit: usize) -> Vec<Option<usize>> {
        let mut places: Vec<Option<usize>> = match self.groups {
            Groups::Runs { first, .. } => vec![None; first % unit],
            Groups::Listed(_) => Vec::new(),
        };
        match &self.groups {
            Groups::Runs { .. } => places.extend((0..self.cols).map(Some)),
            Groups::Listed(listed) => {
                for group in 0..self.count() as u32 {
                    places.extend((0..self.cols).filter(|k| listed[*k] == group).map(Some));
                    places.resize(places.len().next_multiple_of(unit), None);
                }
            }
        }
        places.resize(places.len().next_multiple_of(STAGE_COLS), None);
        places
    }

    /// The records of all strips.
    fn records(&self, unit: usize) -> Vec<u8> {
        let places = self.places(unit);
        let mut words = Vec::new();
        for strip in 0..self.rows.iter().sum::<usize>().div_ceil(STRIP) {
            let rows = strip * STRIP..(strip + 1) * STRIP;
            for stage in places.chunks_exact(STAGE_COLS) {
                self.numbers(rows.clone(), stage, &mut words);
                for run in stage.chunks_exact(unit) {
                    let column = run.iter().flatten().next();
                    let factor = |row: usize| {
                        let (Some(column), Some((part, n))) = (column, self.part_of(row)) else {
                            return 0x4300_0000;
                        };
                        let group = self.groups.of(*column);
                        let bits = u32::from(scale(part, n, group).to_bits());
                        (0x4300 | u32::from(zero(part, n, group))) << 16 | bits
                    };
                    words.extend(rows.clone().map(factor));
                }
            }
        }
        words.into_iter().flat_map(u32::to_le_bytes).collect()
    }

    /// [4 slots][2 halves][32 lanes][4 words]
    fn numbers(&self, rows: Range<usize>, stage: &[Option<usize>], words: &mut Vec<u32>) {
        let number = |row: usize, place: usize| match (stage[place], self.part_of(row)) {
            (Some(column), Some((part, n))) => u32::from(quant(part, n, column)),
            _ => 0,
        };
        for i in 0..STRIP * STAGE_COLS / 8 {
            let (word, lane) = (i % 4, i / 4 % 32);
            let (half, slot) = (i / 128 % 2, i / 256);
            let row = rows.start + half * 32 + lane / 4 * 4 + word / 2 * 2;
            let place = slot * SLOT_COLS + lane % 4 * 8 + word % 2 * 4;
            // Register r of the fragment: the next row for the odd ones, two places on for the
            // last.
            let of_register = |r: usize| {
                let (row, place) = (row + r % 2, place + r / 2 * 2);
                number(row, place) << (4 * r) | number(row, place + 1) << (16 + 4 * r)
            };
            words.push((0..4).fold(0, |value, r| value | of_register(r)));
        }
    }

    #[track_caller]
    fn check(&self, unit: usize, schedule: Schedule) {
        let device = Emulator::load(&library(PLAIN), schedule).expect("the library loads");
        let device = Cuda::new(Spy { device, weights: Mutex::default() }, CudaConfig::default());
        let parts = self.parts();
        let weight = match self.in_turn {
            true => device.gate_up(&parts),
            false => device.weight(&parts),
        };
        let _weight = weight.expect("an upload");
        let weights = device.driver().weights.lock().expect("alone");
        let [(memory, bytes)] = &weights[..] else { panic!("{} weights", weights.len()) };
        let mut got = vec![0; *bytes];
        device.driver().read(&mut got, memory, 0).expect("bytes");
        let wanted = self.records(unit);
        assert_eq!(got.len(), wanted.len());
        let differs = got.iter().zip(&wanted).position(|(got, wanted)| got != wanted);
        assert_eq!(differs, None, "{:?} by {}, {:?}", self.rows, self.cols, self.groups);
    }
}

#[test]
fn groups_of_every_length() {
    for (size, unit) in [(32, 32), (64, 64), (128, 128), (256, 128), (96, 32)] {
        stack([72], 384, runs(size, 0)).check(unit, Schedule::InTurn);
    }
    // One group for all, of any number of columns.
    stack([8], 200, runs(200, 0)).check(128, Schedule::Backwards);
    // The last stage and the last strip are not whole.
    stack([200], 136, runs(32, 0)).check(32, Schedule::Random(3));
}

#[test]
fn parts_follow_each_other_with_seams_inside_strips() {
    stack([24, 56], 128, runs(128, 0)).check(128, Schedule::InTurn);
    stack([40, 8, 24], 256, runs(64, 0)).check(64, Schedule::Random(4));
}

#[test]
fn gate_and_up_lie_in_turn() {
    for rows in [40, 64, 72] {
        let pairs = stack([rows, rows], 256, runs(128, 0));
        Stack { in_turn: true, ..pairs }.check(128, Schedule::InTurn);
    }
}

#[test]
fn columns_of_a_rank_begin_inside_a_group() {
    stack([72], 144, runs(128, 112)).check(128, Schedule::InTurn);
    stack([16], 232, runs(128, 8)).check(128, Schedule::InTurn);
    stack([8, 8], 216, runs(32, 24)).check(32, Schedule::Backwards);
    // Fewer stages in units of 64 than in whole groups.
    stack([8], 64, runs(128, 120)).check(64, Schedule::InTurn);
}

#[test]
fn permuted_columns_lie_group_by_group() {
    let turned = |cols: usize, count: usize| {
        Groups::Listed((0..cols).map(|k| (k * 3 / 7 % count) as u32).collect())
    };
    stack([24], 256, turned(256, 2)).check(128, Schedule::InTurn);
    stack([72], 192, turned(192, 3)).check(64, Schedule::InTurn);
    // A rank's share of groups of every size.
    stack([16, 64], 80, turned(80, 3)).check(32, Schedule::Random(5));
}

#[test]
fn what_is_larger_than_a_piece_is_packed_strip_by_strip() {
    stack([320], 65_536, runs(128, 0)).check(128, Schedule::InTurn);
}

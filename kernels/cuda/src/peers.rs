//! What the ranks of one machine exchange without the host: each maps the others' regions and
//! writes into them. Kernels: `peers.cu`.

use super::{Cuda, Driver, Element, Launch, elementwise::bf16_vectors};
use kernels::{AddNorm, KernelError, Tensor, shape, shape::ensure};
use std::{collections::VecDeque, time::Duration};

/// Ranks that can exchange so; `PEERS_MAX` of the kernels.
pub const PEERS_MAX: usize = 8;
/// Of one call; `PEER_ITEMS_MAX` of the kernels.
const ITEMS_MAX: usize = 4096;
/// Control words and flags, before the areas; `PEER_AREAS` of the kernels.
const AREAS_START: usize = 256 + 2 * 2 * ITEMS_MAX * PEERS_MAX * size_of::<u64>();
/// Columns of a piece of a row that is gathered; `GATHER_COLS` of the kernels.
const GATHER_COLS: usize = 4096;
const GATHER_THREADS: u32 = 256;
const GATHER: &str = "peer_gather";

/// How ranks use each other's memory; the same on every rank.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PeerConfig {
    /// Of each of a region's two areas: bounds what one call exchanges.
    pub area_bytes: usize,
    /// Up to so many bytes every rank sums everything by itself.
    pub one_shot_bytes: usize,
    /// How long a rank waits for another's part of a call, by its device's clock.
    pub limit: Duration,
    /// The same in the first step, for which ranks may have to load code.
    pub first_limit: Duration,
}

impl PeerConfig {
    /// For `ranks` ranks. A one-shot sum sends (ranks - 1) times what a two-shot one saves a
    /// meeting for: the sizes are where others have measured the two to be equal on NVLink.
    pub fn new(ranks: usize, limit: Duration) -> Self {
        let one_shot_bytes = if ranks <= 4 { 512 << 10 } else { 256 << 10 };
        Self { area_bytes: 17 << 20, one_shot_bytes, limit, first_limit: limit }
    }

    /// What a rank's own region takes of its device.
    pub fn region_bytes(&self) -> usize {
        AREAS_START + 2 * self.area_bytes
    }
}

/// A rank's own region, before the others know of it.
pub struct PeerRegion<D: Driver> {
    memory: D::Memory,
    config: PeerConfig,
}

impl<D: Driver> PeerRegion<D> {
    /// # Errors
    /// `KernelError::Memory` where there is not enough; the driver's own.
    pub fn new(driver: &D, config: PeerConfig) -> Result<Self, KernelError> {
        let bytes = config.region_bytes();
        Ok(Self { memory: driver.shared("the exchange between ranks", bytes)?, config })
    }

    /// What another rank needs to map it, as long as this rank has it.
    ///
    /// # Errors
    /// The driver's own.
    pub fn ticket(&self, driver: &D) -> Result<Vec<u8>, KernelError> {
        driver.export(&self.memory)
    }
}

/// The regions of every rank, mapped by this one.
pub struct Peers<D: Driver> {
    /// In rank order.
    regions: Vec<D::Memory>,
    rank: usize,
    config: PeerConfig,
    /// Whether a step of exchanges has come about.
    warm: bool,
    /// Whether exchanges have failed, of steps that were not checked, the oldest first.
    unchecked: VecDeque<D::Reading>,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct RegionsArgs {
    starts: [u64; PEERS_MAX],
    area_bytes: u64,
    limit_ns: u64,
    rank: u32,
    ranks: u32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct SumArgs {
    regions: RegionsArgs,
    x: u64,
    hidden: u64,
    out: u64,
    weight: u64,
    rows: u32,
    cols: u32,
    eps: f32,
}

#[repr(C)]
#[derive(Clone, Copy)]
struct GatherArgs {
    regions: RegionsArgs,
    x: u64,
    out: u64,
    cols: [u32; PEERS_MAX],
    rows: u32,
    pieces: u32,
    to_all: u32,
}

/// Instances of a sum, by the longest row: its kernels one-shot and two-shot, each without and with
/// the norm.
struct Instance {
    cols_max: usize,
    threads: u32,
    kernels: [[&'static str; 2]; 2],
}

const INSTANCES: [Instance; 3] = [
    Instance {
        cols_max: 1024,
        threads: 32,
        kernels: [
            ["peer_sum_1024", "peer_sum_norm_1024"],
            ["peer_sum_twice_1024", "peer_sum_twice_norm_1024"],
        ],
    },
    Instance {
        cols_max: 8192,
        threads: 256,
        kernels: [
            ["peer_sum_8192", "peer_sum_norm_8192"],
            ["peer_sum_twice_8192", "peer_sum_twice_norm_8192"],
        ],
    },
    Instance {
        cols_max: 16384,
        threads: 512,
        kernels: [
            ["peer_sum_16384", "peer_sum_norm_16384"],
            ["peer_sum_twice_16384", "peer_sum_twice_norm_16384"],
        ],
    },
];

impl<D: Driver> Peers<D> {
    /// The regions of the other ranks; `tickets` are every rank's in order, this one's too.
    ///
    /// # Errors
    /// `KernelError::Device` where a region cannot be mapped, or there are too many.
    pub fn map_others(
        driver: &D,
        rank: usize,
        tickets: &[Vec<u8>],
    ) -> Result<Vec<D::Memory>, KernelError> {
        let ranks = tickets.len();
        if ranks > PEERS_MAX || rank >= ranks {
            return Err(KernelError::Device(format!(
                "rank {rank} of {ranks}: up to {PEERS_MAX} ranks exchange by each other's memory"
            )));
        }
        let others = tickets.iter().enumerate().filter(|(of, _)| *of != rank);
        others.map(|(_, ticket)| driver.import(ticket)).collect()
    }

    /// This is rank `rank`; `others` are as [`Self::map_others`] made them.
    pub fn new(own: PeerRegion<D>, rank: usize, others: Vec<D::Memory>) -> Self {
        let PeerRegion { memory, config } = own;
        let mut regions = others;
        regions.insert(rank, memory);
        Self { regions, rank, config, warm: false, unchecked: VecDeque::new() }
    }

    pub fn rank(&self) -> usize {
        self.rank
    }

    pub fn ranks(&self) -> usize {
        self.regions.len()
    }

    /// A step's exchanges have been launched.
    ///
    /// # Errors
    /// The driver's own.
    pub fn end_step(&mut self, driver: &D) -> Result<(), KernelError> {
        const FAILED: usize = 12;
        self.unchecked.push_back(driver.begin_read(&self.regions[self.rank], FAILED, 4)?);
        Ok(())
    }

    /// Whether every exchange has come about up to the oldest [`Self::end_step`] that was not
    /// checked; waits for that.
    ///
    /// # Errors
    /// `KernelError::Device` where another rank did not come in time; the driver's own.
    pub fn check(&mut self, driver: &D) -> Result<(), KernelError> {
        if self.unchecked.is_empty() {
            self.end_step(driver)?;
        }
        let Some(reading) = self.unchecked.pop_front() else { return Ok(()) };
        let mark = driver.end_read(reading)?;
        let limit = self.limit().as_secs_f64();
        if mark == [0; 4] {
            self.warm = true;
            return Ok(());
        }
        Err(KernelError::Device(format!(
            "another rank did not take part in an exchange within {limit} s"
        )))
    }

    fn limit(&self) -> Duration {
        match self.warm {
            true => self.config.limit,
            false => self.config.first_limit,
        }
    }

    fn args(&self, driver: &D) -> RegionsArgs {
        let mut starts = [0; PEERS_MAX];
        let addresses = self.regions.iter().map(|region| driver.address(region));
        starts.iter_mut().zip(addresses).for_each(|(start, address)| *start = address);
        RegionsArgs {
            starts,
            area_bytes: self.config.area_bytes as u64,
            limit_ns: u64::try_from(self.limit().as_nanos()).unwrap_or(u64::MAX),
            rank: self.rank as u32,
            ranks: self.ranks() as u32,
        }
    }

    /// Rows of `cols` that one call sums, and whether one-shot.
    fn rows_at_once(&self, rows: usize, cols: usize) -> (usize, bool) {
        let (row_bytes, ranks) = (cols * Element::Bf16.bytes(), self.ranks());
        let room = self.config.area_bytes / row_bytes.max(1);
        let bytes = rows.saturating_mul(row_bytes);
        if bytes <= self.config.one_shot_bytes && rows <= (room / ranks).min(ITEMS_MAX) {
            return (rows, true);
        }
        // Parts of up to `rows + ranks` rows, and as many sums as rows.
        (room.saturating_sub(ranks).div_euclid(2).min(ITEMS_MAX * ranks), false)
    }
}

impl<D: Driver> Cuda<D> {
    /// x [T, H] = the sum of every rank's x, and what `then` says. Every rank does the same.
    ///
    /// # Errors
    /// `KernelError::Shape` for rows that do not fit together or an area; the driver's own.
    pub fn peer_sum(
        &self,
        peers: &Peers<D>,
        x: &mut Tensor<Self>,
        then: Option<AddNorm<'_, Self>>,
    ) -> Result<(), KernelError> {
        const OP: &str = "peer_sum";
        let (rows, cols) = (x.rows, x.cols);
        let mut args = SumArgs {
            regions: peers.args(&self.driver),
            x: self.at(x),
            hidden: 0,
            out: 0,
            weight: 0,
            rows: 0,
            cols: cols as u32,
            eps: 0.0,
        };
        let norm = usize::from(then.is_some());
        if let Some(AddNorm { x: hidden, out, weight, eps }) = then {
            shape::add(hidden, x)?;
            shape::rms_norm(out, hidden, weight)?;
            bf16_vectors(OP, &[x, hidden, out, weight])?;
            (args.hidden, args.out) = (self.at(hidden), self.at(out));
            (args.weight, args.eps) = (self.at(weight), eps);
        } else {
            bf16_vectors(OP, &[x])?;
        }
        if rows == 0 {
            return Ok(());
        }
        let fits = INSTANCES.iter().find(|instance| cols <= instance.cols_max);
        let (at_once, one_shot) = peers.rows_at_once(rows, cols);
        let Some(instance) = fits.filter(|_| at_once > 0) else {
            ensure(OP, false, || format!("rows of {cols} elements are too long to be exchanged"))?;
            return Ok(());
        };
        let name = instance.kernels[usize::from(!one_shot)][norm];
        let shared = (instance.threads / 32 + 1) * 4;
        for first in (0..rows).step_by(at_once) {
            args.rows = at_once.min(rows - first) as u32;
            let each = if one_shot { 1 } else { peers.ranks() as u32 };
            let grid = [args.rows.div_ceil(each).min(self.driver.facts().multiprocessors), 1, 1];
            let launch = Launch::new(name, grid, instance.threads, &args);
            self.launch_dependent(launch.shared(shared))?;
            let bytes = (at_once * cols * Element::Bf16.bytes()) as u64;
            args.x += bytes;
            (args.hidden, args.out) = (args.hidden + bytes, args.out + bytes);
        }
        Ok(())
    }

    /// out [T, Σ cols] = every rank's x [T, cols_r] side by side, in f32; where not `to_all`, on
    /// rank 0 alone. Every rank does the same.
    ///
    /// # Errors
    /// `KernelError::Shape` for rows that do not fit together or an area; the driver's own.
    pub fn peer_gather(
        &self,
        peers: &Peers<D>,
        out: &mut Tensor<Self>,
        x: &Tensor<Self>,
        cols: &[usize],
        to_all: bool,
    ) -> Result<(), KernelError> {
        let places = (self.at(out), self.at(x));
        gather_fits(GATHER, (peers.rank, peers.ranks()), (out, x), cols)?;
        self.send_columns(peers, places, (x.rows, cols), to_all)
    }

    /// x [T, H] of rank 0, in 32 bits, on every rank.
    ///
    /// # Errors
    /// As [`Self::peer_gather`].
    pub fn peer_share(&self, peers: &Peers<D>, x: &mut Tensor<Self>) -> Result<(), KernelError> {
        let exact = x.data.element() == Element::F32;
        ensure(GATHER, exact, || "numbers are not of 32 bits".into())?;
        let mut cols = vec![0; peers.ranks()];
        cols[0] = x.cols;
        self.send_columns(peers, (self.at(x), self.at(x)), (x.rows, &cols), true)
    }

    /// Rows of `cols` columns from x to out, whose addresses these are.
    fn send_columns(
        &self,
        peers: &Peers<D>,
        (out, x): (u64, u64),
        (rows, cols): (usize, &[usize]),
        to_all: bool,
    ) -> Result<(), KernelError> {
        let total: usize = cols.iter().sum();
        let pieces = cols.iter().max().map_or(0, |widest| widest.div_ceil(GATHER_COLS)).max(1);
        let room = peers.config.area_bytes / (total * Element::F32.bytes()).max(1);
        let at_once = room.min(ITEMS_MAX / pieces);
        ensure(GATHER, at_once > 0, || format!("rows of {total} elements are too long"))?;
        let mut widths = [0; PEERS_MAX];
        widths.iter_mut().zip(cols).for_each(|(to, cols)| *to = *cols as u32);
        let mut args = GatherArgs {
            regions: peers.args(&self.driver),
            x,
            out,
            cols: widths,
            rows: 0,
            pieces: pieces as u32,
            to_all: u32::from(to_all),
        };
        for first in (0..rows).step_by(at_once) {
            args.rows = at_once.min(rows - first) as u32;
            let items = args.rows * args.pieces;
            let grid = [items.min(self.driver.facts().multiprocessors), 1, 1];
            let launch = Launch::new("peer_gather", grid, GATHER_THREADS, &args);
            self.launch_dependent(launch.shared(4))?;
            args.x += (at_once * cols[peers.rank] * Element::F32.bytes()) as u64;
            args.out += (at_once * total * Element::F32.bytes()) as u64;
        }
        Ok(())
    }
}

/// Whether every rank's x [T, cols_r] is out [T, Σ cols] side by side, in f32.
pub(super) fn gather_fits<D: Driver>(
    op: &'static str,
    (rank, ranks): (usize, usize),
    (out, x): (&Tensor<Cuda<D>>, &Tensor<Cuda<D>>),
    cols: &[usize],
) -> Result<(), KernelError> {
    let fits = cols.len() == ranks
        && cols[rank] == x.cols
        && (out.rows, out.cols) == (x.rows, cols.iter().sum());
    ensure(op, fits, || {
        format!("[{}, {}] of columns {cols:?} in [{}, {}]", x.rows, x.cols, out.rows, out.cols)
    })?;
    let exact = [out, x].iter().all(|tensor| tensor.data.element() == Element::F32);
    Ok(ensure(op, exact, || "columns are not in f32".into())?)
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Kernels and launchers are compiled apart: nothing but this compares the numbers.
    #[test]
    fn kernels_and_launchers_mean_the_same_regions() {
        let declared = [
            (include_str!("../cu/peers.cuh"), format!("constexpr int PEERS_MAX = {PEERS_MAX};")),
            (
                include_str!("../cu/peers.cuh"),
                format!("constexpr uint32_t PEER_ITEMS_MAX = {ITEMS_MAX};"),
            ),
            (
                include_str!("../cu/peers.cu"),
                format!("constexpr uint32_t GATHER_COLS = {GATHER_COLS};"),
            ),
        ];
        declared.iter().for_each(|(text, line)| assert!(text.contains(line), "{line}"));
    }
}

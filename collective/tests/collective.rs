//! What both exchanges promise, and how they fail.

use collective::{
    Beats, Collective, CollectiveError, Cut, GroupId, HostCollective, Loss, Staged, Tcp, Threads,
};
use cpu::{Cpu, CpuConfig, Isa, Precision};
use kernels::{Backend, Tensor, plain::Plain};
use rcgen::{BasicConstraints, CertificateParams, IsCa, Issuer, KeyPair};
use std::{
    io::{ErrorKind, Read, Write},
    net::{TcpListener, TcpStream},
    sync::mpsc::{Receiver, RecvTimeoutError, TryRecvError, channel},
    thread,
    time::{Duration, Instant},
};
use tempfile::TempDir;
use tls::{Cluster, Identity, Reason};

const LONG: Duration = Duration::from_secs(20);
const SHORT: Duration = Duration::from_millis(100);

fn id(world_size: usize) -> GroupId {
    GroupId { world_size, epoch: 7, token: "secret".into() }
}

/// The links of every rank, by number.
fn tcp_links(world_size: usize, links: usize) -> Vec<Vec<Tcp>> {
    links_by(world_size, links, None)
}

fn links_by(world_size: usize, links: usize, tls: Option<&Cluster>) -> Vec<Vec<Tcp>> {
    let group = &id(world_size);
    let served = tls.map(|tls| tls.server(&["ranks"]));
    let door = Tcp::listen("127.0.0.1:0", group.clone(), links, served).unwrap();
    let addr = &door.local_addr().unwrap().to_string();
    let join = move |rank| -> Vec<Tcp> {
        // The last first: the order of arrival must not matter.
        let tls = tls.map(|tls| tls.client("ranks"));
        let link = |link| Tcp::connect(addr, (rank, link), group, tls.as_ref(), LONG).unwrap();
        let mut joined: Vec<Tcp> = (0..links).rev().map(link).collect();
        joined.reverse();
        joined
    };
    thread::scope(|scope| {
        let others: Vec<_> =
            (1..world_size).rev().map(|rank| scope.spawn(move || join(rank))).collect();
        let first = door.accept(LONG).unwrap();
        let others = others.into_iter().rev().map(|other| other.join().unwrap());
        std::iter::once(first).chain(others).collect()
    })
}

fn tcp_group(world_size: usize, data_deadline: Duration) -> Vec<Tcp> {
    let mut group: Vec<Tcp> = tcp_links(world_size, 1).into_iter().flatten().collect();
    assert_eq!(group.len(), world_size);
    group.iter_mut().for_each(|rank| rank.set_data_deadline(data_deadline));
    group
}

/// Runs `f` as every rank of `group` at once; the results in rank order.
fn all<H: HostCollective, T: Send>(
    group: Vec<H>,
    f: impl Fn(usize, H) -> T + Sync,
) -> Vec<thread::Result<T>> {
    let f = &f;
    thread::scope(|scope| {
        let run = |(rank, member)| scope.spawn(move || f(rank, member));
        let ranks: Vec<_> = group.into_iter().enumerate().map(run).collect();
        ranks.into_iter().map(|rank| rank.join()).collect()
    })
}

fn numbers(rank: usize, op: usize, len: usize) -> Vec<f32> {
    (0..len)
        .map(|i| ((i * 31 + rank * 17 + op * 7) as f32).sin() * 1e3 / (rank + 1) as f32)
        .collect()
}

fn everything_agrees<H: HostCollective>(group: Vec<H>) {
    let world_size = group.len();
    let results = all(group, |rank, mut member| {
        assert_eq!((member.rank(), member.world_size()), (rank, world_size));
        let mut seen = Vec::new();
        for op in 0..200 {
            let len = [0, 1, 17, 576, 5000][op % 5];
            let mut sum = numbers(rank, op, len);
            member.all_reduce_sum(&mut sum).unwrap();
            let mut want = numbers(0, op, len);
            for other in 1..world_size {
                want.iter_mut().zip(numbers(other, op, len)).for_each(|(w, x)| *w += x);
            }
            assert!(sum.iter().zip(&want).all(|(s, w)| s.to_bits() == w.to_bits()));
            let mut bytes = if rank == 0 { vec![op as u8; len] } else { vec![9; 3] };
            member.broadcast(&mut bytes, LONG).unwrap();
            assert_eq!(bytes, vec![op as u8; len]);
            let of = |rank: usize| vec![(op + rank) as u8; rank * len];
            let gathered = member.all_gather_bytes(&of(rank)).unwrap();
            assert_eq!(gathered, (0..world_size).map(of).collect::<Vec<_>>());
            let cols: Vec<usize> = (0..world_size).map(|r| len + r).collect();
            let mine = numbers(rank, op, 3 * cols[rank]);
            let mut rows = vec![5.0; 3 * cols.iter().sum::<usize>()];
            member.all_gather_cols(&mine, &cols, &mut rows).unwrap();
            let ranks: Vec<_> = (0..world_size).map(|r| numbers(r, op, 3 * cols[r])).collect();
            let share = |row: usize, r: usize| ranks[r][row * cols[r]..][..cols[r]].to_vec();
            let places = (0..3).flat_map(|row| (0..world_size).map(move |r| (row, r)));
            assert_eq!(rows, places.flat_map(|(row, r)| share(row, r)).collect::<Vec<_>>());
            seen.push((sum, rows));
        }
        seen
    });
    let results: Vec<_> = results.into_iter().map(|r| r.unwrap()).collect();
    assert!(results.windows(2).all(|pair| pair[0] == pair[1]));
}

#[test]
fn every_rank_ends_with_the_same_bits() {
    for world_size in 1..=4 {
        everything_agrees(Threads::group(world_size));
        everything_agrees(tcp_group(world_size, LONG));
    }
}

fn large_tensors_pass<H: HostCollective>(group: Vec<H>) {
    let world_size = group.len() as f32;
    let outcomes = all(group, |_, mut member| {
        let mut values = vec![1.5; 3_000_000];
        member.all_reduce_sum(&mut values).unwrap();
        values.iter().all(|&v| v == 1.5 * world_size)
    });
    assert!(outcomes.into_iter().all(|o| o.unwrap()));
}

#[test]
fn large_sums_pass() {
    large_tensors_pass(Threads::group(3));
    large_tensors_pass(tcp_group(3, LONG));
}

/// One rank does `fault` after a few sums; the others must end with an error, soon.
fn a_fault_ends_everyone<H: HostCollective>(
    group: Vec<H>,
    fault: impl Fn(H) + Sync,
) -> Vec<CollectiveError> {
    let start = Instant::now();
    let outcomes = all(group, |rank, mut member| {
        for _ in 0..3 {
            member.all_reduce_sum(&mut [1.0; 8]).unwrap();
        }
        if rank == 1 {
            fault(member);
            return None;
        }
        loop {
            if let Err(error) = member.all_reduce_sum(&mut [1.0; 8]) {
                // The group stays failed, and says why.
                let gathered = member.all_gather_cols(&[], &[0; 3], &mut []);
                assert_eq!(gathered, Err(error.clone()));
                assert_eq!(member.broadcast(&mut vec![], LONG), Err(error.clone()));
                return Some(error);
            }
        }
    });
    assert!(start.elapsed() < Duration::from_secs(10));
    outcomes.into_iter().filter_map(|o| o.ok().flatten()).collect()
}

#[test]
fn a_rank_that_leaves_or_panics_takes_the_group_with_it() {
    let gone = |errors: Vec<CollectiveError>| {
        assert_eq!(errors.len(), 2);
        assert!(errors.iter().all(|e| matches!(e, CollectiveError::Gone { .. })), "{errors:?}");
    };
    gone(a_fault_ends_everyone(Threads::group(3), drop));
    gone(a_fault_ends_everyone(tcp_group(3, LONG), drop));
    gone(a_fault_ends_everyone(Threads::group(3), |_member| panic!("a wedged device")));
    gone(a_fault_ends_everyone(tcp_group(3, LONG), |_member| panic!("a wedged device")));
}

#[test]
fn a_rank_that_never_comes_is_named() {
    let stay = |_member| thread::sleep(5 * SHORT);
    let named = |errors: Vec<CollectiveError>| {
        let late = CollectiveError::Deadline { op: "all_reduce_sum", rank: 1, seconds: 0 };
        assert!(errors.contains(&late), "{errors:?}");
        assert_eq!(errors.len(), 2);
    };
    named(a_fault_ends_everyone(Threads::group_with_deadline(3, SHORT), stay));
    named(a_fault_ends_everyone(tcp_group(3, SHORT), |member: Tcp| {
        thread::sleep(5 * SHORT);
        drop(member);
    }));
}

fn a_follower_waits_no_longer_than_told<H: HostCollective>(mut group: Vec<H>) {
    let start = Instant::now();
    let late = CollectiveError::Deadline { op: "broadcast", rank: 0, seconds: 0 };
    assert_eq!(group[1].broadcast(&mut vec![], SHORT), Err(late));
    assert!(start.elapsed() >= SHORT && start.elapsed() < LONG);
}

#[test]
fn broadcast_has_a_deadline_of_its_own() {
    a_follower_waits_no_longer_than_told(Threads::group(2));
    a_follower_waits_no_longer_than_told(tcp_group(2, LONG));
}

#[test]
fn a_leader_cannot_run_far_ahead() {
    let mut group = Threads::group_with_deadline(2, SHORT);
    let mut sent = 0;
    let error = loop {
        match group[0].broadcast(&mut vec![1], SHORT) {
            Ok(()) => sent += 1,
            Err(error) => break error,
        }
    };
    assert_eq!(error, CollectiveError::Deadline { op: "broadcast", rank: 1, seconds: 0 });
    assert_eq!(sent, 2);
    // What was sent before still arrives.
    assert_eq!(group[1].broadcast(&mut vec![], SHORT), Ok(()));
}

#[test]
fn a_broadcast_waits_for_a_sleeping_follower_and_wakes_it() {
    let results = all(Threads::group(2), |rank, mut member| {
        for round in 0..10u8 {
            thread::sleep(Duration::from_millis(if rank == 0 { 5 } else { 0 }));
            let mut bytes = vec![round; if rank == 0 { 4 } else { 0 }];
            member.broadcast(&mut bytes, LONG).unwrap();
            assert_eq!(bytes, vec![round; 4]);
        }
    });
    assert!(results.into_iter().all(|r| r.is_ok()));
}

fn disagreement_is_found<H: HostCollective>(group: Vec<H>) {
    let outcomes = all(group, |rank, mut member| {
        if rank == 0 {
            member.all_reduce_sum(&mut [1.0; 4])
        } else {
            member.all_reduce_sum(&mut [1.0; 5])
        }
    });
    let mismatch = |o: &thread::Result<_>| matches!(o, Ok(Err(CollectiveError::Mismatch(_))));
    assert!(outcomes.iter().any(mismatch), "{outcomes:?}");
    assert!(outcomes.iter().all(|o| matches!(o, Ok(Err(_)))), "{outcomes:?}");
}

fn widths_that_do_not_fit_are_found<H: HostCollective>(group: Vec<H>) {
    let outcomes = all(group, |rank, mut member| {
        let cols = if rank == 0 { [4, 4] } else { [4, 5] };
        member.all_gather_cols(&vec![1.0; cols[rank]], &cols, &mut vec![0.0; 4 + cols[1]])
    });
    let mismatch = |o: &thread::Result<_>| matches!(o, Ok(Err(CollectiveError::Mismatch(_))));
    assert!(outcomes.iter().any(mismatch), "{outcomes:?}");
}

fn disorder_is_found<H: HostCollective>(group: Vec<H>) {
    let outcomes = all(group, |rank, mut member| {
        if rank == 0 {
            member.all_reduce_sum(&mut [1.0; 4])
        } else {
            member.all_gather_cols(&[1.0; 4], &[0, 4], &mut [0.0; 4])
        }
    });
    let mismatch = |o: &thread::Result<_>| matches!(o, Ok(Err(CollectiveError::Mismatch(_))));
    assert!(outcomes.iter().any(mismatch), "{outcomes:?}");
}

#[test]
fn ranks_that_disagree_are_told() {
    disagreement_is_found(Threads::group(2));
    disagreement_is_found(tcp_group(2, LONG));
    widths_that_do_not_fit_are_found(Threads::group(2));
    widths_that_do_not_fit_are_found(tcp_group(2, LONG));
    disorder_is_found(Threads::group(2));
    disorder_is_found(tcp_group(2, LONG));
}

#[test]
fn strangers_are_turned_away_and_the_group_still_forms() {
    let door = Tcp::listen("127.0.0.1:0", id(3), 1, None).unwrap();
    let addr = &door.local_addr().unwrap().to_string();
    thread::scope(|scope| {
        let first = scope.spawn(move || door.accept(LONG).map(|links| links[0].world_size()));
        let mut noise = TcpStream::connect(addr).unwrap();
        noise.write_all(b"GET / HTTP/1.1\r\nhost: x.example\r\n\r\n").unwrap();
        // The door may answer with a reset rather than an end.
        let _ = noise.read(&mut [0]);
        drop(TcpStream::connect(addr).unwrap());
        let refused = |(rank, link), group: GroupId, why: &str| {
            let refused = Tcp::connect(addr, (rank, link), &group, None, LONG).err();
            let Some(CollectiveError::Mismatch(told)) = refused else { panic!("{refused:?}") };
            assert!(told.contains(why), "{told}");
        };
        refused((1, 0), GroupId { token: "guess".into(), ..id(3) }, "token");
        refused((1, 0), GroupId { epoch: 6, ..id(3) }, "epoch");
        refused((1, 0), GroupId { epoch: 7 << 32, ..id(3) }, "epoch");
        refused((1, 0), id(2), "world size");
        refused((1, 1), id(3), "does not exist");
        refused((3, 0), id(4), "world size");
        let _one = Tcp::connect(addr, (1, 0), &id(3), None, LONG).unwrap();
        refused((1, 0), id(3), "taken");
        let _two = Tcp::connect(addr, (2, 0), &id(3), None, LONG).unwrap();
        assert_eq!(first.join().unwrap(), Ok(3));
    });
}

/// What the ranks of a cluster with a CA of its own have.
fn cluster() -> (Cluster, TempDir) {
    let (dir, key) = (tempfile::tempdir().unwrap(), KeyPair::generate().unwrap());
    let path = |name: &str| dir.path().join(name);
    let mut params = CertificateParams::default();
    params.is_ca = IsCa::Ca(BasicConstraints::Unconstrained);
    std::fs::write(path("ca.crt"), params.self_signed(&key).unwrap().pem()).unwrap();
    let issuer = Issuer::new(params, key);
    let (own, params) = (KeyPair::generate().unwrap(), [tls::CLUSTER_NAME.to_owned()]);
    let made = CertificateParams::new(params).unwrap().signed_by(&own, &issuer).unwrap();
    std::fs::write(path("own.crt"), made.pem()).unwrap();
    std::fs::write(path("own.key"), own.serialize_pem()).unwrap();
    let identity = Identity { cert: path("own.crt"), key: path("own.key") };
    (Cluster::load(identity, path("ca.crt")).unwrap(), dir)
}

#[test]
fn links_by_tls_carry_the_same_and_end_in_the_same_ways() {
    let (cluster, _dir) = cluster();
    let group = |ranks| links_by(ranks, 1, Some(&cluster)).into_iter().flatten().collect();
    everything_agrees::<Tcp>(group(3));
    disorder_is_found::<Tcp>(group(2));
    // Several megabytes, which fill sockets and records both.
    let long = all(group(2), |rank, mut member: Tcp| {
        let mut values = numbers(rank, 0, 3 << 20);
        member.all_reduce_sum(&mut values).unwrap();
        values
    });
    let long: Vec<Vec<f32>> = long.into_iter().map(Result::unwrap).collect();
    assert!(long[0] == long[1], "all ranks hold the same bits");
    // Signs of life, until one side has gone.
    let mut links: Vec<Tcp> = group(2);
    let (of_one, of_zero) = (links.pop().unwrap(), links.pop().unwrap());
    let (ours, lost) = told(of_zero, Duration::from_secs(2));
    let (theirs, _) = told(of_one, Duration::from_secs(2));
    assert_eq!(lost.recv_timeout(Duration::from_secs(3)), Err(RecvTimeoutError::Timeout));
    drop(theirs);
    assert_eq!(lost.recv_timeout(LONG), Ok((1, Loss::Closed)));
    drop(ours);
}

#[test]
fn who_is_set_up_otherwise_is_told_on_both_sides() {
    let ((ours, _own), (others, _other)) = (cluster(), cluster());
    let refused = |served: Option<&Cluster>, calls: Option<&Cluster>| {
        let served = served.map(|tls| tls.server(&["ranks"]));
        let mut door = Tcp::listen("127.0.0.1:0", id(2), 1, served).unwrap();
        let addr = door.local_addr().unwrap().to_string();
        let calls = calls.map(|tls| tls.client("ranks"));
        let patience = Duration::from_secs(1);
        let call = move || Tcp::connect(&addr, (1, 0), &id(2), calls.as_ref(), patience).map(drop);
        let calling = thread::spawn(call);
        let mut seen = None;
        while !calling.is_finished() {
            door.admit(SHORT).unwrap();
            seen = door.refused().map(|(_, fault)| fault.reason).or(seen);
        }
        (seen, calling.join().unwrap().unwrap_err().to_string())
    };
    let (seen, told) = refused(Some(&ours), Some(&others));
    assert!(told.contains("not of a CA that is trusted here"), "{told}");
    assert_eq!(seen, Some(Reason::Refused));
    let (seen, told) = refused(None, Some(&ours));
    assert!(told.contains("it left in the TLS handshake"), "{told}");
    assert_eq!(seen, Some(Reason::PlainText));
    let (seen, _) = refused(Some(&ours), None);
    assert_eq!(seen, Some(Reason::PlainText));
}

#[test]
fn a_rank_that_came_and_ended_may_come_again() {
    let mut door = Tcp::listen("127.0.0.1:0", id(3), 2, None).unwrap();
    let addr = &door.local_addr().unwrap().to_string();
    let connect = |rank, link| {
        let addr = addr.clone();
        thread::spawn(move || Tcp::connect(&addr, (rank, link), &id(3), None, LONG).unwrap())
    };
    let mut admitted = |rank, link, missing: &[usize]| {
        let joining = connect(rank, link);
        while !joining.is_finished() {
            door.admit(SHORT).unwrap();
        }
        assert_eq!(door.missing(), missing);
        joining.join().unwrap()
    };
    let first = [admitted(1, 0, &[1, 2]), admitted(1, 1, &[2])];
    drop(first);
    let _again = [admitted(1, 0, &[1, 2]), admitted(1, 1, &[2])];
    let _other = [admitted(2, 1, &[2]), admitted(2, 0, &[])];
    assert_eq!(door.links().unwrap().len(), 2);
    // As long as it lasts it can be seen that somebody is behind it.
    assert!(TcpStream::connect(addr).is_ok());
    drop(door);
    let gone = TcpStream::connect(addr).err().map(|error| error.kind());
    assert_eq!(gone, Some(ErrorKind::ConnectionRefused));
}

#[test]
fn a_rank_that_gets_no_verdict_asks_again() {
    let listener = TcpListener::bind("127.0.0.1:0").unwrap();
    let addr = listener.local_addr().unwrap().to_string();
    let joining = thread::spawn(move || Tcp::connect(&addr, (1, 0), &id(2), None, LONG).map(drop));
    // As after a cut of the network: the first is closed unheard, the second was never read.
    drop(listener.accept().unwrap());
    let _silent = listener.accept().unwrap();
    let (mut third, _) = listener.accept().unwrap();
    third.read_exact(&mut [0; 32 + 6]).unwrap();
    third.write_all(&[0]).unwrap();
    assert_eq!(joining.join().unwrap(), Ok(()));
}

#[test]
fn a_group_that_does_not_form_ends_at_its_deadline() {
    let listen = || Tcp::listen("127.0.0.1:0", id(2), 1, None).unwrap();
    let late = CollectiveError::Deadline { op: "accept", rank: 1, seconds: 0 };
    assert_eq!(listen().accept(SHORT).err(), Some(late));
    assert_eq!(listen().links().err(), Some(CollectiveError::Gone { rank: 1 }));
    let nobody = listen().local_addr().unwrap().to_string();
    let late = CollectiveError::Deadline { op: "connect", rank: 0, seconds: 0 };
    assert_eq!(Tcp::connect(&nobody, (1, 0), &id(2), None, SHORT).err(), Some(late));
    for rank in [0, 2] {
        let wrong = Tcp::connect(&nobody, (rank, 0), &id(2), None, SHORT).err();
        assert!(matches!(wrong, Some(CollectiveError::Mismatch(_))));
    }
}

/// Ranks 0, 1 and 2 by one link each, for signs of life.
fn beating() -> [Tcp; 3] {
    tcp_group(3, LONG).try_into().unwrap_or_else(|_| panic!("three ranks"))
}

fn told(of: Tcp, silence: Duration) -> (Beats, Receiver<(usize, Loss)>) {
    let (sender, receiver) = channel();
    let lost = move |rank, loss| sender.send((rank, loss)).unwrap();
    (Beats::start(of, silence, lost).unwrap(), receiver)
}

#[test]
fn a_rank_that_falls_silent_or_leaves_is_named() {
    let silence = Duration::from_secs(1);
    let [leader, one, two] = beating();
    let (_leading, lost) = told(leader, silence);
    let (ones, one_lost) = told(one, silence);
    // Longer than the silence: whoever beats is not lost, and nobody else is told of rank 2.
    assert_eq!(lost.recv_timeout(3 * silence), Ok((2, Loss::Silent(silence))));
    assert_eq!(lost.recv_timeout(2 * silence), Err(RecvTimeoutError::Timeout));
    assert_eq!(one_lost.try_recv(), Err(TryRecvError::Empty));
    drop(ones);
    assert_eq!(lost.recv_timeout(LONG), Ok((1, Loss::Closed)));
    // Who ends its own signs of life is told nothing.
    assert_eq!(one_lost.recv_timeout(LONG), Err(RecvTimeoutError::Disconnected));
    drop(two);
}

#[test]
fn whoever_waits_on_a_link_that_is_cut_returns_at_once() {
    let mut links = tcp_links(2, 2);
    let (mut waiting, cut) = (links[0].remove(1), Cut::of(&[&links[0][0]]).unwrap());
    let cut_both = Cut::of(&[&waiting, &links[0][0]]).unwrap();
    cut.cut();
    let gone = Err(CollectiveError::Gone { rank: 1 });
    assert_eq!(links[0][0].all_reduce_sum(&mut [1.0]), gone.clone());
    let began = Instant::now();
    thread::scope(|scope| {
        let waiting = scope.spawn(move || waiting.all_reduce_sum(&mut [1.0]));
        thread::sleep(SHORT);
        cut_both.cut();
        assert_eq!(waiting.join().unwrap(), gone);
    });
    assert!(began.elapsed() < LONG);
}

fn tensors_are_exchanged<B: Backend, H: HostCollective>(
    group: Vec<H>,
    device: impl Fn() -> B + Sync,
) {
    let world_size = group.len();
    let outcomes = all(group, |rank, member| {
        let device = device();
        let mut group = Staged::new(member);
        // Rank r brings columns 10 r … 10 r + r of three rows.
        let widths: Vec<usize> = (0..world_size).map(|r| r + 1).collect();
        let value = |row: usize, rank: usize, col: usize| (100 * row + 10 * rank + col) as f32;
        let mine: Vec<f32> =
            (0..3).flat_map(|row| (0..rank + 1).map(move |c| value(row, rank, c))).collect();
        let x = Tensor::from_host(&device, rank + 1, &mine).unwrap();
        let total = widths.iter().sum();
        let mut out = Tensor::zeros(&device, 4, total).unwrap();
        out.rows = 3;
        Collective::<B>::all_gather_cols(&mut group, &device, &mut out, &x, &widths).unwrap();
        let mut got = vec![0.0; 3 * total];
        device.read_floats(&mut got, &out.data).unwrap();
        let want: Vec<f32> = (0..3)
            .flat_map(|row| {
                (0..world_size).flat_map(move |r| (0..r + 1).map(move |c| value(row, r, c)))
            })
            .collect();
        assert_eq!(got, want);
        // Rows past those in use take no part in a sum.
        let mut x = Tensor::from_host(&device, 2, &[1.0, 2.0, 3.0, 4.0, 7.0, 7.0]).unwrap();
        x.rows = 2;
        Collective::<B>::all_reduce_sum(&mut group, &device, &mut x).unwrap();
        let mut got = vec![0.0; 6];
        device.read_floats(&mut got, &x.data).unwrap();
        let n = world_size as f32;
        assert_eq!(got, [n, 2.0 * n, 3.0 * n, 4.0 * n, 7.0, 7.0]);
        out.rows = 1;
        let wrong = Collective::<B>::all_gather_cols(&mut group, &device, &mut out, &x, &widths);
        assert!(wrong.is_err());
    });
    assert!(outcomes.into_iter().all(|o| o.is_ok()));
}

#[test]
fn tensors_are_exchanged_through_the_host() {
    let config = CpuConfig { threads: 1, precision: Precision::Fast, isa: Isa::detect() };
    for world_size in 1..=3 {
        tensors_are_exchanged(Threads::group(world_size), || Plain);
        tensors_are_exchanged(Threads::group(world_size), || Cpu::new(config).unwrap());
        tensors_are_exchanged(tcp_group(world_size, LONG), || Plain);
    }
}

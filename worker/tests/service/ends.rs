//! How groups, workers and requests end, and what is told while a step takes long.

use super::*;

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_lost_group_fails_its_streams_and_leaves_the_roster() {
    for panics in [false, true] {
        let w = world(8).await;
        w.levers.step_micros.store(1000, Ordering::SeqCst);
        let mut first = w.run(request(10, 400)).await.unwrap();
        let second = w.run(request(10, 400)).await.unwrap();
        assert!(first.message().await.unwrap().is_some());
        assert_eq!(w.roster.borrow().len(), 1);
        let lever = if panics { &w.levers.panic } else { &w.levers.fail };
        lever.store(true, Ordering::SeqCst);
        for stream in [first, second] {
            let status = read(stream).await.err().expect("an error, not an end");
            assert_eq!(status.code(), Code::Unavailable, "{status}");
            let told = ["rank 1 ended", "a test said so"];
            assert!(told.iter().any(|told| status.message().contains(told)), "{status}");
        }
        let end = timeout(PATIENCE, w.handle.join()).await.expect("in time");
        assert!(matches!(end, Err(WorkerError::Group(_))), "{end:?}");
        assert!(w.roster.borrow().is_empty());
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn draining_finishes_what_runs_and_takes_nothing_new() {
    let mut w = world(8).await;
    w.levers.step_micros.store(2000, Ordering::SeqCst);
    let stream = w.run(request(10, 100)).await.unwrap();
    let reader = tokio::spawn(read(stream));
    assert_eq!(w.roster.borrow()[0].state, State::Ready);
    w.shutdown.send(true).unwrap();
    let draining = w.roster.wait_for(|roster| {
        roster.first().is_some_and(|instance| instance.state == State::Draining)
    });
    drop(timeout(PATIENCE, draining).await.expect("in time").unwrap());
    // The roster hears of it first; the refusal follows within the same task.
    let refused = timeout(PATIENCE, async {
        loop {
            match w.run(request(4, 1)).await {
                Ok(stream) => drop(read(stream).await),
                Err(status) => break status,
            }
        }
    });
    assert_eq!(refused.await.expect("in time").code(), Code::Unavailable);
    let answer = reader.await.unwrap().unwrap();
    assert_eq!((answer.ids.len(), answer.finish), (100, v1::Finish::Length));
    timeout(PATIENCE, w.handle.join()).await.expect("in time").unwrap();
    assert!(w.roster.borrow().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn draining_cuts_what_does_not_end() {
    let w = world(8).await;
    w.levers.step_micros.store(20_000, Ordering::SeqCst);
    let stream = w.run(request(10, 400)).await.unwrap();
    let reader = tokio::spawn(read(stream));
    let start = Instant::now();
    let end = timeout(PATIENCE, w.handle.drain(Duration::from_millis(200))).await;
    let end = end.expect("in time");
    assert!(matches!(end, Err(WorkerError::DrainLimit { streams: 1, .. })), "{end:?}");
    assert!(start.elapsed() < Duration::from_secs(5), "{:?}", start.elapsed());
    assert_eq!(reader.await.unwrap().err().expect("cut").code(), Code::Unavailable);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn whoever_operates_it_may_ask_for_its_end() {
    let mut w = world(8).await;
    w.levers.step_micros.store(1000, Ordering::SeqCst);
    let mut stream = w.run(request(10, 400)).await.unwrap();
    let drain = v1::DrainRequest { seconds: None };
    let answer = w.client.clone().drain(drain).await.unwrap().into_inner();
    assert_eq!(answer.streams, 1);
    let drains = |roster: &Roster| roster[0].state == State::Draining;
    timeout(PATIENCE, w.roster.wait_for(drains)).await.expect("in time").unwrap();
    assert_eq!(w.run(request(10, 4)).await.expect_err("refused").code(), Code::Unavailable);
    while stream.message().await.expect("it finishes").is_some() {}
    timeout(PATIENCE, w.handle.join()).await.expect("in time").expect("in order");
    assert!(w.roster.borrow().is_empty());
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn who_watches_hears_who_it_is_how_busy_and_that_it_lives() {
    let w = world(8).await;
    let mut client = w.client.clone();
    let mut watch = client.watch(v1::WatchRequest {}).await.unwrap().into_inner();
    let mut next = async || timeout(PATIENCE, watch.message()).await.expect("in time").unwrap();
    let first = next().await.expect("a report");
    let instance = cluster::Instance::decode(&first.instance).unwrap();
    assert_eq!(instance, *w.roster.borrow()[0].clone());
    let idle = first.load.expect("a load");
    let blocks = BLOCKS as u32;
    assert_eq!((idle.running, idle.blocks_free, idle.places), (0, blocks, 4 + 8));
    let start = Instant::now();
    assert_eq!(next().await, Some(v1::WorkerReport::default()), "a beat");
    assert!(start.elapsed() < Duration::from_secs(2), "{:?}", start.elapsed());

    // A step that lasts: nothing waits for it.
    w.levers.step_micros.store(1_500_000, Ordering::SeqCst);
    let stream = w.run(request(100, 400)).await.unwrap();
    let mut load = async |wanted: &dyn Fn(v1::Load) -> bool| loop {
        let load = next().await.expect("a report").load;
        if let Some(load) = load.filter(|load| wanted(*load)) {
            return load;
        }
    };
    let busy = load(&|load| load.running == 1).await;
    assert!(busy.blocks_free < blocks);
    w.levers.step_micros.store(1000, Ordering::SeqCst);
    drop(stream);
    let calm = load(&|load| load.running == 0).await;
    assert_eq!((calm.blocks_free, calm.finished, calm.prefill_tokens), (blocks, 1, 0));
    w.shutdown.send_replace(true);
    while next().await.is_some() {}
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn an_idle_worker_tells_its_ranks_that_it_lives() {
    let w = world(8).await;
    tokio::time::sleep(Duration::from_millis(1300)).await;
    assert!(w.levers.idles.load(Ordering::SeqCst) >= 1);
    assert_eq!(w.levers.steps.load(Ordering::SeqCst), 0);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_models_files_arrive_whole() {
    let w = world(8).await;
    let mut client = w.client.clone();
    let mut stream = client.describe_model(v1::DescribeModelRequest {}).await.unwrap().into_inner();
    let mut files: BTreeMap<String, Vec<u8>> = BTreeMap::new();
    while let Some(part) = timeout(PATIENCE, stream.message()).await.unwrap().unwrap() {
        assert!(part.data.len() <= 1 << 20);
        files.entry(part.name).or_default().extend(&part.data);
    }
    assert_eq!(files, w.handle.info().text_files);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn many_clients_that_vanish_leave_nothing_behind() {
    let w = world(64).await;
    w.levers.step_micros.store(200, Ordering::SeqCst);
    let mut clients = tokio::task::JoinSet::new();
    for client in 0..100u64 {
        let mut worker = w.client.clone();
        clients.spawn(async move {
            let asked = request(1 + (client as usize * 7) % 90, 200);
            let running = async {
                let mut stream = worker.run(asked).await?.into_inner();
                while stream.message().await?.is_some() {}
                Ok::<(), Status>(())
            };
            // Most vanish somewhere on the way.
            drop(timeout(Duration::from_millis((client * 13) % 300), running).await);
        });
    }
    while clients.join_next().await.is_some() {}
    let sequences = ["sequences_running", "sequences_waiting"];
    w.until("none is left", |figure| sequences.map(figure) == [0, 0]).await;
    w.until("all free", |figure| figure("blocks_free") == BLOCKS).await;
    assert_eq!(read(w.run(request(4, 3)).await.unwrap()).await.unwrap().ids, [4, 5, 6]);
}

/// A step that lasts long enough for everything that a test does meanwhile.
const LONG_STEP_MICROS: u64 = 4_000_000;

impl World {
    /// Starts a sequence whose step lasts long.
    async fn in_a_long_step(&self) -> Streaming<v1::RunResponse> {
        self.levers.step_micros.store(LONG_STEP_MICROS, Ordering::SeqCst);
        let stream = self.run(request(100, 4)).await.unwrap();
        let started = || self.levers.steps.load(Ordering::SeqCst) == 1;
        for _ in 0..1000 {
            if started() {
                break;
            }
            tokio::time::sleep(Duration::from_millis(2)).await;
        }
        assert!(started(), "the step began");
        stream
    }

    fn still_in_the_step(&self) -> bool {
        self.levers.steps_done.load(Ordering::SeqCst) == 0
    }
}

async fn progress(stream: &mut Streaming<v1::RunResponse>) -> v1::Progress {
    let message = timeout(PATIENCE, stream.message()).await.expect("in time").unwrap();
    message.expect("a message").progress.expect("progress alone")
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_long_step_keeps_nobody_waiting_for_an_answer() {
    let w = world(2).await;
    let _busy = w.in_a_long_step().await;
    // Three places are open and two may wait.
    let mut accepted = Vec::new();
    for _ in 0..5 {
        accepted.push(w.run(request(4, 1)).await.unwrap());
    }
    assert_eq!(w.refused(request(4, 1)).await.code(), Code::ResourceExhausted);
    assert_eq!(w.refused(request(512, 4)).await.code(), Code::InvalidArgument);
    for (ahead, stream) in accepted.iter_mut().enumerate() {
        let told = progress(stream).await;
        let wanted = v1::Progress { waiting_ahead: ahead as u32, prompt: 4, ..Default::default() };
        assert_eq!(told, wanted);
    }
    assert!(w.still_in_the_step(), "all of it within one step");
    w.levers.step_micros.store(0, Ordering::SeqCst);
    for stream in accepted {
        assert_eq!(read(stream).await.unwrap().ids, [4]);
    }
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn progress_is_told_while_there_is_nothing_else_to_say() {
    let w = world(8).await;
    let mut stream = w.in_a_long_step().await;
    let first = progress(&mut stream).await;
    assert_eq!((first.prefilled, first.prompt), (0, 100));
    let second = progress(&mut stream).await;
    assert!(second.running && second.prefilled == 0, "{second:?}");
    assert!(w.still_in_the_step());
    // 64 tokens are computed in the first step, 36 in the second, which brings a token.
    let mut told = Vec::new();
    let token = loop {
        let message = timeout(PATIENCE, stream.message()).await.expect("in time").unwrap().unwrap();
        match message.progress {
            Some(progress) => told.push(progress.prefilled),
            None => break message,
        }
    };
    assert!(told.contains(&64) && told.is_sorted(), "{told:?}");
    assert_eq!(token.tokens[0].id, 100);
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn a_group_that_hangs_ends_its_worker() {
    let w = world_with(8, Duration::from_secs(1)).await;
    let stream = w.in_a_long_step().await;
    let end = timeout(PATIENCE, w.handle.join()).await.expect("in time");
    let reason = end.expect_err("a failure").to_string();
    assert!(reason.contains("hangs") && reason.contains("--step-limit-seconds"), "{reason}");
    assert!(w.roster.borrow().is_empty());
    assert!(read(stream).await.is_err(), "its streams end without a finish");
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn requests_that_the_loop_never_saw_fail_with_the_group() {
    let w = world(8).await;
    let busy = w.in_a_long_step().await;
    let late = w.run(request(4, 1)).await.unwrap();
    w.levers.fail.store(true, Ordering::SeqCst);
    for stream in [busy, late] {
        let status = read(stream).await.err().expect("an error, not an end");
        assert_eq!(status.code(), Code::Unavailable, "{status}");
        assert!(status.message().contains("rank 1 ended"), "{status}");
    }
}

//! The engine loop over an executor that wants two plans in flight.

use std::{
    collections::VecDeque,
    sync::{Arc, Mutex},
    time::Duration,
};

use engine::{
    End, Request, SchedulerConfig,
    plan::{
        Executor, ExecutorError, SamplingParams, StepOutput, StepPlan, TokenLogprob, Tokens, Want,
    },
};
use tokio::time::timeout;
use worker::{Engine, Metrics, News, Output};

const PATIENCE: Duration = Duration::from_secs(30);
const EOS: u32 = 9;

/// Samples the sequence's length as the next token, and writes down what it is called for.
struct Overlapped {
    calls: Arc<Mutex<Vec<String>>>,
    outputs: VecDeque<StepOutput>,
}

impl Executor for Overlapped {
    fn depth(&self) -> usize {
        2
    }

    fn launch(&mut self, plan: StepPlan) -> Result<(), ExecutorError> {
        assert!(self.outputs.len() < 2, "more than two plans in flight");
        let unknown = plan.chunks.iter().filter(|c| c.tokens == Tokens::LastSampled).count();
        self.calls.lock().unwrap().push(format!("launch {}, {unknown} unknown", plan.number));
        let wanted = plan.chunks.iter().filter(|chunk| chunk.want == Want::Sample);
        let sampled = wanted.map(|chunk| {
            let token = chunk.end() as u32;
            (chunk.sequence, TokenLogprob { token, logprob: None, top: Vec::new() })
        });
        let sampled = sampled.collect();
        self.outputs.push_back(StepOutput { number: plan.number, sampled, ..Default::default() });
        Ok(())
    }

    fn finish(&mut self) -> Result<StepOutput, ExecutorError> {
        let output = self.outputs.pop_front();
        let output = output.ok_or_else(|| ExecutorError("nothing launched".into()))?;
        self.calls.lock().unwrap().push(format!("finish {}", output.number));
        Ok(output)
    }

    fn idle(&mut self) -> Result<(), ExecutorError> {
        assert!(self.outputs.is_empty(), "idle with a plan in flight");
        Ok(())
    }
}

fn request(prompt: usize, max_tokens: usize) -> Request {
    Request {
        prompt: vec![1; prompt],
        generated: Vec::new(),
        params: SamplingParams::GREEDY,
        max_tokens,
        stop_ids: vec![EOS],
        score_prompt: false,
    }
}

async fn read(mut output: Output) -> (Vec<u32>, Option<End>) {
    let (mut ids, mut end) = (Vec::new(), None);
    while let Some(news) = timeout(PATIENCE, output.next()).await.expect("in time") {
        let News::Update(update) = news.unwrap() else { continue };
        ids.extend(update.tokens.iter().map(|token| token.token));
        end = update.end;
    }
    (ids, end)
}

#[tokio::test(flavor = "multi_thread", worker_threads = 2)]
async fn the_next_plan_is_launched_before_the_oldest_is_finished() {
    let calls = Arc::new(Mutex::new(Vec::new()));
    let executor = Overlapped { calls: Arc::clone(&calls), outputs: VecDeque::new() };
    let bounds = SchedulerConfig {
        blocks: 64,
        step_tokens_max: 64,
        step_target: None,
        sequences_max: 4,
        waiting_max: 8,
        context_max: 512,
        prefix_reuse_max: None,
    };
    let metrics = Arc::new(Metrics::new("fake"));
    let engine = Engine::start(Box::new(executor), bounds, metrics).unwrap();
    let answer = read(engine.run(request(20, 4)).unwrap()).await;
    assert_eq!(answer, (vec![20, 21, 22, 23], Some(End::Length)));
    let expected = [
        "launch 0, 0 unknown",
        "launch 1, 1 unknown",
        "finish 0",
        "launch 2, 1 unknown",
        "finish 1",
        "launch 3, 1 unknown",
        "finish 2",
        "finish 3",
    ];
    assert_eq!(*calls.lock().unwrap(), expected);

    // The stop is seen when the next plan is in flight already; what that samples is dropped.
    calls.lock().unwrap().clear();
    assert_eq!(read(engine.run(request(8, 40)).unwrap()).await, (vec![8, EOS], Some(End::Stop)));
    let long = engine.run(request(100, 300)).unwrap();
    let short = engine.run(request(4, 3)).unwrap();
    assert_eq!(read(short).await, (vec![4, 5, 6], Some(End::Length)));
    assert_eq!(read(long).await, ((100..400).collect(), Some(End::Length)));
    let mut stats = engine.stats();
    let freed = timeout(PATIENCE, stats.wait_for(|stats| stats.blocks_free == 64)).await;
    assert_eq!(freed.expect("in time").unwrap().finished, 4);
    tokio::task::spawn_blocking(move || engine.stop()).await.unwrap();
}

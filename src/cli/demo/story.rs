//! What happens in the demo, scene by scene.

use super::data::Data;
use super::ledger::Values;
use super::load::Load;
use super::recall::recall;
use super::record::Span;
use super::report::{Moved, Scene};
use super::stage::{HEALING, Stage, connect, is_down};
use super::verify::{Verdict, verify};
use crate::clock::fresh_operation;
use crate::error::{Error, Result};
use crate::model::admin::MigrateRequest;
use crate::model::{Consistency, NodeId};
use futures::{StreamExt, TryStreamExt};
use std::time::Duration;

/// Entries of one write of the import.
const BATCH: usize = 500;
/// Writes of the import under way at a time.
const PARALLEL: usize = 4;
/// How long the load runs before anything happens, and after each kill.
const CALM: Duration = Duration::from_secs(3);
/// The automatic rebalance is over when it has moved nothing for so long.
const REBALANCE: Duration = Duration::from_secs(20);

/// Everything that was measured.
#[derive(Debug, Default)]
pub(super) struct Measured {
    pub(super) recall: f64,
    pub(super) scenes: Vec<Scene>,
    pub(super) moved: Moved,
    pub(super) crash_noticed: Duration,
    pub(super) leader_failover: Duration,
    pub(super) verdict: Verdict,
}

impl Stage<'_> {
    /// The whole demo, once the first nodes run.
    pub(super) async fn perform(&mut self, data: &Data, namespace: &str) -> Result<Measured> {
        let first = self.local.nodes().len();
        self.steps.begin("the nodes find each other and share out the shards");
        let steps = self.steps;
        self.until_green(first, |text| steps.progress(&text)).await?;
        let leader = self.leader().await?;
        self.steps.done(&format!("{first} nodes are up, every shard has its replicas, {leader} leads"));
        self.import(data).await?;
        let mut measured = Measured { recall: self.recall(data).await?, ..Measured::default() };

        let client = connect(&self.local.url(), namespace, Duration::from_secs(1)).await?;
        // The session of the steady client begins with all that was imported.
        client.count_with(Consistency::Linearizable).await?;
        let load = Load::start(client, Values { entries: data.entries.clone() }, self.clock);
        self.scenes(&load, &mut measured).await?;

        self.steps.begin("reading back every acknowledged write");
        let mut books = load.stop().await?;
        let values = Values { entries: data.entries.clone() };
        let (verdict, stored) = verify(&self.client, &values, &mut books).await?;
        self.steps
            .done(&format!("{} writes were read back", books.ledger.total() + data.entries.len() as u64));
        measured.recall = measured.recall.min(recall(&self.client, stored).await?);
        measured.verdict = verdict;
        for scene in &mut measured.scenes {
            scene.measure(&books);
        }
        measured.verdict.take(books);
        Ok(measured)
    }

    async fn scenes(&mut self, load: &Load, measured: &mut Measured) -> Result<()> {
        let from = self.clock.now();
        self.steps.begin("a client writes and reads all the time");
        self.watch(load, CALM).await;
        self.scene(measured, "calm", from);
        self.steps.done(&format!("a client writes and reads: {}", load.line()));

        self.join(load, measured).await?;
        let leader = self.leader().await?;
        let victim = self.local.nodes().iter().map(|node| node.id()).find(|id| *id != leader);
        let victim = victim.ok_or_else(|| Error::Internal("every node leads".into()))?.to_owned();
        self.kill(load, measured, &victim).await?;
        self.restart(load, measured, &victim).await?;
        let leader = self.leader().await?;
        self.kill_leader(load, measured, &leader).await
    }

    fn scene(&self, measured: &mut Measured, name: &'static str, from: Duration) {
        measured.scenes.push(Scene::new(name, Span { from, to: self.clock.now() }));
    }

    /// Lets time pass while the load runs.
    async fn watch(&self, load: &Load, span: Duration) {
        let until = self.clock.now() + span;
        while self.clock.now() < until {
            self.steps.progress(&load.line());
            tokio::time::sleep(Duration::from_millis(100)).await;
        }
    }

    async fn heal(&mut self, load: &Load) -> Result<()> {
        let (nodes, steps) = (self.local.nodes().len(), self.steps);
        self.until_green(nodes, |text| steps.progress(&format!("{text}; {}", load.line()))).await
    }

    /// Imports all vectors; a part that gets no answer is sent again under its operation id.
    async fn import(&mut self, data: &Data) -> Result<()> {
        let total = data.entries.len();
        self.steps.begin(&format!("importing {total} vectors of {} dimensions", data.dimensions));
        let (client, begun, steps) = (self.client.clone(), self.clock.now(), self.steps);
        let parts = data.entries.chunks(BATCH).map(|part| {
            let client = client.clone();
            async move {
                let (op_id, mut last) = (fresh_operation(), None);
                for _ in 0..5 {
                    match client.upsert_as(op_id, part.to_vec()).await {
                        Ok(_) => return Ok(part.len()),
                        Err(error) if error.is_retryable() => last = Some(error),
                        Err(error) => return Err(error),
                    }
                }
                Err(last.unwrap_or_else(|| Error::Internal("no write was tried".into())).context("import"))
            }
        });
        let mut done = 0;
        let mut written = futures::stream::iter(parts).buffer_unordered(PARALLEL);
        while let Some(count) = written.try_next().await? {
            done += count;
            steps.progress(&format!("{done} of {total}"));
        }
        drop(written);
        let count = self.client.count_with(Consistency::Linearizable).await?;
        if count != total as u64 {
            return Err(Error::Corrupt(format!("{total} vectors were imported, {count} are there")));
        }
        let rate = total as f64 / (self.clock.now() - begun).as_secs_f64();
        self.steps
            .done(&format!("{total} vectors of {} dimensions imported, {rate:.0} a second", data.dimensions));
        Ok(())
    }

    async fn recall(&mut self, data: &Data) -> Result<f64> {
        self.steps.begin("comparing searches with an exact scan");
        let recall = recall(&self.client, data.entries.clone()).await?;
        self.steps.done(&format!("searches find what an exact scan finds: recall@10 is {recall:.4}"));
        Ok(recall)
    }

    /// A node joins; the cluster moves shards to it by itself.
    async fn join(&mut self, load: &Load, measured: &mut Measured) -> Result<()> {
        let before = self.migrations().await?;
        let from = self.clock.now();
        let node = self.local.add_node()?;
        self.steps.begin(&format!("{node} joins"));
        self.heal_to(load, &node).await?;
        self.scene(measured, "node_join", from);
        let sizes = self.client.admin().shards().await?;
        let fresh = self.migrations().await?;
        let fresh = fresh.into_iter().filter(|(id, _)| !before.contains_key(id)).map(|(_, record)| record);
        measured.moved = Moved::of(fresh, &sizes);
        self.steps.done(&format!("{node} has joined and taken its share: {}", measured.moved));
        Ok(())
    }

    /// Waits until the rebalance is over; asks for one move if there is none.
    async fn heal_to(&mut self, load: &Load, node: &NodeId) -> Result<()> {
        self.heal(load).await?;
        let (shards, factor) = (self.client.settings().num_shards, self.client.settings().replication_factor);
        let members = self.local.nodes().len();
        let share = shards as usize * (factor as usize).min(members) / members;
        let (steps, clock) = (self.steps, self.clock);
        let mut last = (0, clock.now());
        self.until("the new node has its share of shards", HEALING, async |client| {
            let held = Stage::held(client, node).await.map_err(|e| e.to_string())?;
            steps.progress(&format!("{held} of {share} shards are there; {}", load.line()));
            if held != last.0 {
                last = (held, clock.now());
            }
            let stands_still = clock.now() - last.1 > REBALANCE;
            if held + 1 >= share || stands_still {
                Ok(())
            } else {
                Err(format!("it holds {held} of {share}"))
            }
        })
        .await?;
        self.heal(load).await?;
        // With few shards all is even without a move.
        if Stage::held(&self.client, node).await? == 0 {
            self.steps.begin(&format!("moving a shard to {node}"));
            self.move_one(node).await?;
            self.heal(load).await?;
        }
        Ok(())
    }

    async fn move_one(&mut self, node: &NodeId) -> Result<()> {
        let shards = self.client.admin().shards().await?;
        let shard = shards.iter().map(|view| &view.record).find(|record| !record.has_replica(node));
        let shard = shard.ok_or_else(|| Error::Internal(format!("{node} holds every shard")))?.shard;
        let request = MigrateRequest { shard, to: node.clone(), from: None };
        self.client.admin().migrate(&request).await?;
        self.until("the shard has moved", HEALING, async |client| match Stage::held(client, node).await {
            Ok(0) => Err("it is still on its way".to_owned()),
            Ok(_) => Ok(()),
            Err(error) => Err(error.to_string()),
        })
        .await
    }

    /// A node is killed that does not lead.
    async fn kill(&mut self, load: &Load, measured: &mut Measured, node: &str) -> Result<()> {
        self.steps.begin(&format!("kill -9 {node}"));
        let from = self.clock.now();
        self.local.kill_node(node).await?;
        self.until_seen(&format!("{node} is noticed to be down"), |view| is_down(view, node)).await?;
        measured.crash_noticed = self.clock.now() - from;
        let noticed = measured.crash_noticed.as_millis();
        self.watch(load, CALM).await;
        self.scene(measured, "node_kill", from);
        self.steps.done(&format!("{node} was killed, which was noticed after {noticed} ms: {}", load.line()));
        Ok(())
    }

    async fn restart(&mut self, load: &Load, measured: &mut Measured, node: &str) -> Result<()> {
        self.steps.begin(&format!("{node} starts again"));
        let from = self.clock.now();
        self.local.restart(node)?;
        self.heal(load).await?;
        self.scene(measured, "node_restart", from);
        let took = (self.clock.now() - from).as_secs_f64();
        self.steps.done(&format!("{node} is back, every shard is full after {took:.1} s: {}", load.line()));
        Ok(())
    }

    async fn kill_leader(&mut self, load: &Load, measured: &mut Measured, leader: &NodeId) -> Result<()> {
        self.steps.begin(&format!("kill -9 {leader}, the leader"));
        let from = self.clock.now();
        self.local.kill_node(leader).await?;
        self.until_seen("another node leads", |view| {
            view.leader().and_then(|record| record.node.as_ref()).is_some_and(|node| node != leader)
        })
        .await?;
        measured.leader_failover = self.clock.now() - from;
        let successor = self.leader().await?;
        let took = measured.leader_failover.as_millis();
        self.watch(load, CALM).await;
        self.steps.done(&format!("{leader}, the leader, was killed: {successor} leads after {took} ms"));
        self.steps.begin(&format!("{leader} starts again"));
        self.local.restart(leader)?;
        self.heal(load).await?;
        self.scene(measured, "leader_kill", from);
        self.steps.done(&format!("{leader} is back, every shard is full: {}", load.line()));
        Ok(())
    }
}

//! The weighted ketama ring of libmemcached, point for point: for programs that share keys with its clients.
//!
//! Not our own ring (that is [`Ring`](super::Ring)), and none of the other things called ketama: unweighted
//! ketama, `KETAMA_SPY` and Last.fm's libketama name, count or hash their points differently.
//! Keeps: the order of servers is theirs; an answer is their position in the list.

use crate::error::{Error, Result};
use md5::{Digest, Md5};
use serde::Deserialize;

/// Points of a server of average weight.
const POINTS: f32 = 160.0;
/// Points made of one MD5.
const GROUP: f32 = 4.0;
/// memcached's own port: points of a server there are named without it.
const DEFAULT_PORT: u16 = 11_211;

/// One server of a [`Ketama`] ring.
#[derive(Debug, Clone, PartialEq, Eq, Deserialize)]
#[serde(deny_unknown_fields)]
pub struct KetamaServer {
    /// Name or address, as it is spelled in the other program. Empty: `localhost`.
    pub host: String,
    /// Port; 0 or absent: 11211.
    #[serde(default)]
    pub port: u16,
    /// Share relative to others; 0 or absent: 1.
    #[serde(default)]
    pub weight: u32,
}

impl KetamaServer {
    fn weight(&self) -> u32 {
        self.weight.max(1)
    }

    /// What the MD5 of a group of points is of.
    fn name(&self, group: u32) -> String {
        let host = if self.host.is_empty() { "localhost" } else { &self.host };
        match self.port {
            0 | DEFAULT_PORT => format!("{host}-{group}"),
            port => format!("{host}:{port}-{group}"),
        }
    }
}

/// Weighted ketama as libmemcached computes it with `MEMCACHED_BEHAVIOR_KETAMA_WEIGHTED`.
///
/// Source: libmemcached's `hosts.cc` (the points) and `hash.cc` (the key), whose f32 arithmetic it follows:
/// f64 gives other numbers of points. A very light server may get no point and so no key.
///
/// ```
/// use ruvector_cluster::hash::{Ketama, KetamaServer};
/// let server = |host: &str, weight| KetamaServer { host: host.to_owned(), port: 7_000, weight };
/// let ring = Ketama::new(&[server("node-a", 1), server("node-b", 2), server("node-c", 3)])?;
/// assert!(ring.server_of(b"some key") < 3);
/// # Ok::<(), ruvector_cluster::Error>(())
/// ```
#[derive(Debug, Clone)]
pub struct Ketama {
    /// Value and server, sorted: of equal values, the one of the first server counts.
    points: Vec<(u32, u32)>,
}

impl Ketama {
    /// The ring of these servers.
    ///
    /// # Errors
    /// [`Error::Invalid`] when there is no server.
    pub fn new(servers: &[KetamaServer]) -> Result<Ketama> {
        if servers.is_empty() {
            return Err(Error::Invalid("a ketama ring needs at least one server".into()));
        }
        let total: u64 = servers.iter().map(|server| u64::from(server.weight())).sum();
        let mut points = Vec::with_capacity(servers.len() * POINTS as usize);
        for (index, server) in servers.iter().enumerate() {
            for group in 0..groups(server.weight(), total, servers.len()) {
                let digest = Md5::digest(server.name(group));
                let (values, _) = digest.as_chunks::<4>();
                points.extend(values.iter().map(|value| (u32::from_le_bytes(*value), index as u32)));
            }
        }
        points.sort_unstable();
        Ok(Ketama { points })
    }

    /// The server of a key: its position in the list.
    pub fn server_of(&self, key: &[u8]) -> usize {
        let hash = Ketama::hash_key(key);
        let at = self.points.partition_point(|(value, _)| *value < hash);
        // With a single server this is that one, as libmemcached answers without looking.
        self.points.get(at).or(self.points.first()).map_or(0, |(_, server)| *server as usize)
    }

    /// How many points a server has on the ring.
    pub fn points_of(&self, server: usize) -> usize {
        self.points.iter().filter(|(_, owner)| *owner as usize == server).count()
    }

    /// Where a key is on the ring: the first four bytes of its MD5, little-endian.
    pub fn hash_key(key: &[u8]) -> u32 {
        let [a, b, c, d, ..] = <[u8; 16]>::from(Md5::digest(key));
        u32::from_le_bytes([a, b, c, d])
    }
}

/// Groups of points of a server. Every step rounds to f32, in this order.
fn groups(weight: u32, total: u64, servers: usize) -> u32 {
    let share = weight as f32 / total as f32;
    (share * POINTS / GROUP * servers as f32 + 1e-10).floor() as u32
}

#[cfg(test)]
mod tests {
    use super::*;

    #[derive(Deserialize)]
    struct Vectors {
        clusters: Vec<Cluster>,
        rows: Vec<Row>,
    }

    #[derive(Deserialize)]
    struct Cluster {
        id: String,
        servers: Vec<KetamaServer>,
    }

    #[derive(Deserialize)]
    struct Row {
        cluster: String,
        key: String,
        /// Value of the point that answers, where libmemcached publishes it.
        point: Option<u32>,
    }

    fn server(host: &str, port: u16, weight: u32) -> KetamaServer {
        KetamaServer { host: host.to_owned(), port, weight }
    }

    #[test]
    fn points_are_where_libmemcached_publishes_them() {
        let vectors: Vectors = serde_json::from_str(include_str!("../../../tests/data/ketama.json")).unwrap();
        let mut compared = 0;
        for cluster in &vectors.clusters {
            let ring = Ketama::new(&cluster.servers).unwrap();
            for row in vectors.rows.iter().filter(|row| row.cluster == cluster.id) {
                let Some(point) = row.point else { continue };
                let hash = Ketama::hash_key(row.key.as_bytes());
                let at = ring.points.partition_point(|(value, _)| *value < hash);
                assert_eq!(ring.points[at].0, point, "{}", row.key);
                compared += 1;
            }
        }
        assert_eq!(compared, 99);
    }

    #[test]
    fn equal_servers_sometimes_lose_a_group_to_rounding() {
        for (servers, groups_each) in [(2, 40), (10, 40), (25, 39), (47, 39), (50, 39), (94, 39), (100, 39)] {
            assert_eq!(groups(1, servers, servers as usize), groups_each, "{servers}");
        }
    }

    #[test]
    fn a_very_light_server_gets_nothing() {
        let ring = Ketama::new(&[server("a", 1, 1_000), server("b", 1, 1), server("c", 1, 50)]).unwrap();
        assert_eq!([0, 1, 2].map(|i| ring.points_of(i)), [456, 0, 20]);
    }

    #[test]
    fn what_is_not_said_is_as_in_libmemcached() {
        let text = r#"[{"host": "a"}, {"host": "a", "port": 0, "weight": 0}, {"host": "a", "port": 11211, "weight": 1}]"#;
        let servers: Vec<KetamaServer> = serde_json::from_str(text).unwrap();
        assert!(servers.iter().all(|s| s.name(3) == "a-3" && s.weight() == 1));
        assert_eq!(server("", 7, 1).name(0), "localhost:7-0");
        assert!(serde_json::from_str::<KetamaServer>(r#"{"host": "a", "wieght": 2}"#).is_err());
    }

    #[test]
    fn of_equal_points_the_first_server_answers() {
        let twins = Ketama::new(&[server("a", 1, 1), server("a", 1, 1)]).unwrap();
        assert!((0..1_000u32).all(|key| twins.server_of(&key.to_le_bytes()) == 0));
        assert_eq!(Ketama::new(&[server("a", 1, 1)]).unwrap().server_of(b"x"), 0);
        assert!(Ketama::new(&[]).unwrap_err().to_string().contains("at least one"));
    }
}

//! Decodes the byte stream of a `TCPStore` client into requests.
//!
//! A request is an opcode and its arguments, without a length. Parsed arguments are kept until the request is complete, so that each byte
//! is parsed once, however the request is fragmented. Integers are little-endian.

/// The opcode that changes a connection to the rendezvous protocol. No `TCPStore` has it: torch's server closes the connection.
pub const UPGRADE: u8 = 0xFE;

/// The magic number in the first message of a connection.
pub const MAGIC: u32 = 0x3C85_F7CE;

/// Limits of a client's requests. A client that exceeds them is disconnected, as by torch's server.
///
/// A connection holds at most one request and one reply of the maximum size, and a few MiB. The stored data and the number of connections
/// have no limit: every client of the port is trusted as a worker of the job.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Limits {
    /// Maximum size of a key: 8 KiB, as in torch.
    pub key_bytes: u64,
    /// Maximum size of a value in a request: 8 MiB, as in torch.
    pub value_bytes: u64,
    /// Maximum number of keys in a request: 131,072, as in torch.
    pub keys: u64,
    /// Maximum size of all keys and values in a request: 256 MiB. Torch's server has no such limit.
    pub request_bytes: u64,
    /// Maximum size of a reply: 256 MiB. Torch's server has no such limit. A short request can ask for a large value many times, and
    /// `APPEND` makes values larger than a request.
    pub reply_bytes: u64,
}

impl Default for Limits {
    fn default() -> Self {
        Self { key_bytes: 8192, value_bytes: 8 << 20, keys: 131_072, request_bytes: 256 << 20, reply_bytes: 256 << 20 }
    }
}

/// Capacity that the buffers of an idle connection may keep. Thousands of connections may be idle.
const KEPT_CAPACITY: usize = 1024;

/// A key as stored, with the prefixes that clients add.
pub type Key = Box<[u8]>;
/// A value.
pub type Value = Vec<u8>;

/// A request.
#[derive(Clone, Debug, PartialEq, Eq)]
#[allow(missing_docs, reason = "the names are the protocol's")]
pub enum StoreRequest {
    Set {
        key: Key,
        value: Value,
    },
    CompareSet {
        key: Key,
        expected: Value,
        desired: Value,
    },
    Get {
        key: Key,
    },
    Add {
        key: Key,
        delta: i64,
    },
    Check {
        keys: Vec<Key>,
    },
    Wait {
        keys: Vec<Key>,
    },
    GetNumKeys,
    DeleteKey {
        key: Key,
    },
    Append {
        key: Key,
        value: Value,
    },
    MultiGet {
        keys: Vec<Key>,
    },
    MultiSet {
        pairs: Vec<(Key, Value)>,
    },
    CancelWait,
    Ping {
        nonce: u32,
    },
    QueuePush {
        key: Key,
        value: Value,
    },
    QueuePop {
        key: Key,
    },
    QueueLen {
        key: Key,
    },
    ListKeys,
    Barrier {
        key: Key,
        world_size: i64,
    },
    /// An extension of this package: the rendezvous protocol follows.
    Upgrade,
}

/// Why a connection is closed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    /// The first byte is not the opcode of a client's first message.
    #[error("the peer is not a TCPStore client: its first byte is {0:#04x}")]
    NotAClient(u8),
    /// The first message has a wrong magic number.
    #[error("the peer is not a TCPStore client: its magic number is {0:#010x}")]
    WrongMagic(u32),
    /// The opcode is unknown or out of place.
    #[error("opcode {0} is unknown or out of place")]
    Opcode(u8),
    /// A limit is exceeded.
    #[error("{item} of {size} is over the limit of {limit}")]
    TooLarge {
        /// The limited item.
        item: &'static str,
        /// The announced size.
        size: u64,
        /// The limit.
        limit: u64,
    },
}

/// An incompletely parsed request.
#[derive(Debug, Default)]
struct Partial {
    opcode: u8,
    /// Parsed keys and values in their order.
    fields: Vec<Vec<u8>>,
    /// Number of elements (keys or pairs) of a list.
    count: Option<u64>,
    /// Total size of the fields.
    bytes: u64,
}

/// Decodes the stream of one connection into requests.
#[derive(Debug)]
pub struct Decoder {
    limits: Limits,
    is_validated: bool,
    buffer: Vec<u8>,
    /// Number of parsed bytes in the buffer.
    parsed: usize,
    partial: Option<Partial>,
}

pub(crate) mod opcode {
    pub(crate) const VALIDATE: u8 = 0;
    pub(crate) const SET: u8 = 1;
    pub(crate) const COMPARE_SET: u8 = 2;
    pub(crate) const GET: u8 = 3;
    pub(crate) const ADD: u8 = 4;
    pub(crate) const CHECK: u8 = 5;
    pub(crate) const WAIT: u8 = 6;
    pub(crate) const GET_NUM_KEYS: u8 = 7;
    pub(crate) const DELETE_KEY: u8 = 8;
    pub(crate) const APPEND: u8 = 9;
    pub(crate) const MULTI_GET: u8 = 10;
    pub(crate) const MULTI_SET: u8 = 11;
    pub(crate) const CANCEL_WAIT: u8 = 12;
    pub(crate) const PING: u8 = 13;
    pub(crate) const QUEUE_PUSH: u8 = 14;
    pub(crate) const QUEUE_POP: u8 = 15;
    pub(crate) const QUEUE_LEN: u8 = 16;
    pub(crate) const LIST_KEYS: u8 = 17;
    pub(crate) const BARRIER: u8 = 18;
}

/// The kind of a field, which determines its limit.
#[derive(Clone, Copy)]
enum Field {
    Key,
    Value,
}

impl Decoder {
    /// The decoder of a new connection.
    #[must_use]
    pub fn new(limits: Limits) -> Self {
        Self { limits, is_validated: false, buffer: Vec::new(), parsed: 0, partial: None }
    }

    /// Takes the next bytes of the stream.
    pub fn feed(&mut self, bytes: &[u8]) {
        // Drops the parsed bytes once they are at least half of the buffer: amortised O(1) per byte.
        if self.parsed > 0 && self.parsed * 2 >= self.buffer.len() {
            self.buffer.drain(..self.parsed);
            self.parsed = 0;
        }
        self.buffer.extend_from_slice(bytes);
    }

    /// Number of bytes held for an incomplete request.
    #[must_use]
    pub fn held(&self) -> usize {
        let fields = self.partial.as_ref().map_or(0, |partial| usize::try_from(partial.bytes).unwrap_or(usize::MAX));
        fields.saturating_add(self.buffer.len() - self.parsed)
    }

    /// Takes the bytes after the last decoded request.
    pub fn take_rest(&mut self) -> Vec<u8> {
        self.buffer.split_off(self.parsed)
    }

    /// Resets the buffer if all its bytes have been parsed.
    fn reset_if_parsed(&mut self) {
        if self.parsed == self.buffer.len() {
            reset_buffer(&mut self.buffer);
            self.parsed = 0;
        }
    }

    /// The next request; `None` until more bytes arrive.
    #[expect(clippy::should_implement_trait, reason = "not an iterator: there may be more after None")]
    pub fn next(&mut self) -> Result<Option<StoreRequest>, Refusal> {
        if !self.is_validated && !self.validate()? {
            return Ok(None);
        }
        if self.partial.is_none() {
            self.partial = self.take_array::<1>().map(|[opcode]| Partial { opcode, ..Partial::default() });
        }
        let Some(mut partial) = self.partial.take() else {
            self.reset_if_parsed();
            return Ok(None);
        };
        let request = self.arguments(&mut partial)?;
        if request.is_none() {
            self.partial = Some(partial);
        }
        Ok(request)
    }

    /// Whether the first message is complete. It has no reply.
    fn validate(&mut self) -> Result<bool, Refusal> {
        match self.buffer.get(self.parsed) {
            None => return Ok(false),
            Some(&opcode::VALIDATE) => {}
            Some(&other) => return Err(Refusal::NotAClient(other)),
        }
        let Some([_, magic @ ..]) = self.take_array::<5>() else { return Ok(false) };
        let magic = u32::from_le_bytes(magic);
        if magic != MAGIC {
            return Err(Refusal::WrongMagic(magic));
        }
        self.is_validated = true;
        Ok(true)
    }

    fn arguments(&mut self, partial: &mut Partial) -> Result<Option<StoreRequest>, Refusal> {
        use Field::{Key, Value};

        let request = match partial.opcode {
            opcode::SET => {
                self.fields(partial, &[Key, Value])?.map(|[key, value]| StoreRequest::Set { key: boxed(key), value })
            }
            opcode::COMPARE_SET => self
                .fields(partial, &[Key, Value, Value])?
                .map(|[key, expected, desired]| StoreRequest::CompareSet { key: boxed(key), expected, desired }),
            opcode::GET => self.fields(partial, &[Key])?.map(|[key]| StoreRequest::Get { key: boxed(key) }),
            opcode::ADD => self.key_and_number(partial)?.map(|(key, delta)| StoreRequest::Add { key, delta }),
            opcode::CHECK => self.list(partial)?.map(|keys| StoreRequest::Check { keys }),
            opcode::WAIT => self.list(partial)?.map(|keys| StoreRequest::Wait { keys }),
            opcode::GET_NUM_KEYS => Some(StoreRequest::GetNumKeys),
            opcode::DELETE_KEY => {
                self.fields(partial, &[Key])?.map(|[key]| StoreRequest::DeleteKey { key: boxed(key) })
            }
            opcode::APPEND => {
                self.fields(partial, &[Key, Value])?.map(|[key, value]| StoreRequest::Append { key: boxed(key), value })
            }
            opcode::MULTI_GET => self.list(partial)?.map(|keys| StoreRequest::MultiGet { keys }),
            opcode::MULTI_SET => self.pairs(partial)?.map(|pairs| StoreRequest::MultiSet { pairs }),
            opcode::CANCEL_WAIT => Some(StoreRequest::CancelWait),
            opcode::PING => self.take_array().map(|nonce| StoreRequest::Ping { nonce: u32::from_le_bytes(nonce) }),
            opcode::QUEUE_PUSH => self
                .fields(partial, &[Key, Value])?
                .map(|[key, value]| StoreRequest::QueuePush { key: boxed(key), value }),
            opcode::QUEUE_POP => self.fields(partial, &[Key])?.map(|[key]| StoreRequest::QueuePop { key: boxed(key) }),
            opcode::QUEUE_LEN => self.fields(partial, &[Key])?.map(|[key]| StoreRequest::QueueLen { key: boxed(key) }),
            opcode::LIST_KEYS => Some(StoreRequest::ListKeys),
            opcode::BARRIER => {
                self.key_and_number(partial)?.map(|(key, world_size)| StoreRequest::Barrier { key, world_size })
            }
            UPGRADE => Some(StoreRequest::Upgrade),
            unknown => return Err(Refusal::Opcode(unknown)),
        };
        Ok(request)
    }

    fn fields<const N: usize>(
        &mut self,
        partial: &mut Partial,
        kinds: &[Field; N],
    ) -> Result<Option<[Vec<u8>; N]>, Refusal> {
        while partial.fields.len() < N {
            if !self.field(partial, kinds[partial.fields.len()])? {
                return Ok(None);
            }
        }
        Ok(std::mem::take(&mut partial.fields).try_into().ok())
    }

    fn key_and_number(&mut self, partial: &mut Partial) -> Result<Option<(Key, i64)>, Refusal> {
        if partial.fields.is_empty() && !self.field(partial, Field::Key)? {
            return Ok(None);
        }
        let Some(number) = self.take_array() else { return Ok(None) };
        Ok(partial.fields.pop().map(|key| (boxed(key), i64::from_le_bytes(number))))
    }

    fn list(&mut self, partial: &mut Partial) -> Result<Option<Vec<Key>>, Refusal> {
        if !self.list_fields(partial, &[Field::Key])? {
            return Ok(None);
        }
        Ok(Some(std::mem::take(&mut partial.fields).into_iter().map(boxed).collect()))
    }

    fn pairs(&mut self, partial: &mut Partial) -> Result<Option<Vec<(Key, Value)>>, Refusal> {
        if !self.list_fields(partial, &[Field::Key, Field::Value])? {
            return Ok(None);
        }
        let mut fields = std::mem::take(&mut partial.fields).into_iter();
        let mut pairs = Vec::with_capacity(fields.len() / 2);
        while let (Some(key), Some(value)) = (fields.next(), fields.next()) {
            pairs.push((boxed(key), value));
        }
        Ok(Some(pairs))
    }

    /// Whether all fields of a list are parsed. Each element of the list has fields of these kinds.
    fn list_fields(&mut self, partial: &mut Partial, kinds: &[Field]) -> Result<bool, Refusal> {
        let count = match partial.count {
            Some(count) => count,
            None => match self.take_array() {
                Some(count) => u64::from_le_bytes(count),
                None => return Ok(false),
            },
        };
        check_limit("a number of keys", count, self.limits.keys)?;
        partial.count = Some(count);
        // Cannot overflow: the number of keys is limited.
        let expected = usize::try_from(count).unwrap_or(usize::MAX).saturating_mul(kinds.len());
        while partial.fields.len() < expected {
            if !self.field(partial, kinds[partial.fields.len() % kinds.len()])? {
                return Ok(false);
            }
        }
        Ok(true)
    }

    /// Parses the next field; `false` until it is complete.
    fn field(&mut self, partial: &mut Partial, kind: Field) -> Result<bool, Refusal> {
        let Some(announced) = self.buffer[self.parsed..].first_chunk() else { return Ok(false) };
        let size = u64::from_le_bytes(*announced);
        match kind {
            Field::Key => check_limit("a key", size, self.limits.key_bytes)?,
            Field::Value => check_limit("a value", size, self.limits.value_bytes)?,
        }
        check_limit("a request", partial.bytes.saturating_add(size), self.limits.request_bytes)?;
        let start = self.parsed + size_of::<u64>();
        let Some(bytes) = usize::try_from(size).ok().and_then(|size| self.buffer.get(start..start.checked_add(size)?))
        else {
            return Ok(false);
        };
        partial.fields.push(bytes.to_vec());
        partial.bytes += size;
        self.parsed = start + partial.fields.last().map_or(0, Vec::len);
        Ok(true)
    }

    fn take_array<const N: usize>(&mut self) -> Option<[u8; N]> {
        let array = *self.buffer[self.parsed..].first_chunk()?;
        self.parsed += N;
        Some(array)
    }
}

/// Empties a buffer of a connection. Frees a large buffer instead of shrinking it, because shrinking would fragment the heap.
pub(crate) fn reset_buffer(buffer: &mut Vec<u8>) {
    if buffer.capacity() > KEPT_CAPACITY {
        *buffer = Vec::new();
    } else {
        buffer.clear();
    }
}

fn boxed(key: Vec<u8>) -> Key {
    key.into_boxed_slice()
}

fn check_limit(item: &'static str, size: u64, limit: u64) -> Result<(), Refusal> {
    if size <= limit { Ok(()) } else { Err(Refusal::TooLarge { item, size, limit }) }
}

//! Writes GGUF files by hand.

/// A GGUF file in the making. Counts follow the entries unless set.
pub struct GgufFile {
    pub version: u32,
    pub alignment: u64,
    entries: Vec<Vec<u8>>,
    infos: Vec<Vec<u8>>,
    data: Vec<u8>,
    pub tensor_count: Option<u64>,
    pub entry_count: Option<u64>,
}

pub fn string(text: &str) -> Vec<u8> {
    [&(text.len() as u64).to_le_bytes()[..], text.as_bytes()].concat()
}

impl GgufFile {
    pub fn new() -> Self {
        Self {
            version: 3,
            alignment: 32,
            entries: Vec::new(),
            infos: Vec::new(),
            data: Vec::new(),
            tensor_count: None,
            entry_count: None,
        }
    }

    /// A metadata entry of any type; `bytes` as the format stores the value.
    pub fn entry(&mut self, key: &str, kind: u32, bytes: &[u8]) -> &mut Self {
        self.entries.push([&string(key), &kind.to_le_bytes()[..], bytes].concat());
        self
    }

    pub fn text(&mut self, key: &str, value: &str) -> &mut Self {
        self.entry(key, 8, &string(value))
    }

    pub fn u32(&mut self, key: &str, value: u32) -> &mut Self {
        self.entry(key, 4, &value.to_le_bytes())
    }

    pub fn f32(&mut self, key: &str, value: f32) -> &mut Self {
        self.entry(key, 6, &value.to_le_bytes())
    }

    pub fn strings(&mut self, key: &str, values: &[&str]) -> &mut Self {
        let mut bytes = [&8u32.to_le_bytes()[..], &(values.len() as u64).to_le_bytes()].concat();
        values.iter().for_each(|value| bytes.extend(string(value)));
        self.entry(key, 9, &bytes)
    }

    /// A tensor after those before it; `dims` innermost first, as the format stores them.
    pub fn tensor(&mut self, name: &str, dims: &[u64], kind: u32, data: &[u8]) -> &mut Self {
        self.data.resize(self.data.len().next_multiple_of(self.alignment as usize), 0);
        let offset = self.data.len() as u64;
        self.data.extend(data);
        self.info(name, dims, kind, offset)
    }

    /// A description without data.
    pub fn info(&mut self, name: &str, dims: &[u64], kind: u32, offset: u64) -> &mut Self {
        let mut info = string(name);
        info.extend((dims.len() as u32).to_le_bytes());
        dims.iter().for_each(|dim| info.extend(dim.to_le_bytes()));
        info.extend(kind.to_le_bytes());
        info.extend(offset.to_le_bytes());
        self.infos.push(info);
        self
    }

    pub fn bytes(&self) -> Vec<u8> {
        let mut file = b"GGUF".to_vec();
        file.extend(self.version.to_le_bytes());
        file.extend(self.tensor_count.unwrap_or(self.infos.len() as u64).to_le_bytes());
        file.extend(self.entry_count.unwrap_or(self.entries.len() as u64).to_le_bytes());
        self.entries.iter().chain(&self.infos).for_each(|part| file.extend(part));
        file.resize(file.len().next_multiple_of(self.alignment as usize), 0);
        file.extend(&self.data);
        file
    }
}

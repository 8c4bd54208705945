// Runs in the browser's sound thread: hands on each block of the microphone's first channel, float32 (128,).

class Blocks extends AudioWorkletProcessor {
  process([channels]) {
    if (channels.length) this.port.postMessage(channels[0].slice());
    return true;
  }
}

registerProcessor("blocks", Blocks);
